// Runs the fuzz target without libFuzzer: every file of the corpus, then the files with bytes changed at random.
//
//   driver CORPUS SECONDS
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

namespace {

using Input = std::vector<uint8_t>;

Input changed(Input input, std::mt19937 &random) {
  if (random() % 4 == 0) input.resize(random() % 600);
  for (unsigned n = 1 + random() % 16; n > 0 && !input.empty(); --n)
    input[random() % (random() % 2 ? input.size() : std::min<size_t>(input.size(), 24))] = uint8_t(random());
  return input;
}

}  // namespace

int main(int argc, char **argv) {
  if (argc != 3) return fprintf(stderr, "usage: %s CORPUS SECONDS\n", argv[0]), 2;
  std::vector<Input> corpus;
  for (const auto &entry : std::filesystem::directory_iterator(argv[1])) {
    std::ifstream file(entry.path(), std::ios::binary);
    corpus.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
    fprintf(stderr, "%s\n", entry.path().filename().c_str());
    LLVMFuzzerTestOneInput(corpus.back().data(), corpus.back().size());
  }
  if (corpus.empty()) corpus.emplace_back(64, uint8_t(0));
  std::mt19937 random(1);
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(atof(argv[2]));
  long runs = 0;
  for (; std::chrono::steady_clock::now() < end; ++runs) {
    const Input input = changed(corpus[random() % corpus.size()], random);
    if (FILE *file = fopen("last_input", "wb")) {  // what to look at if this is the last one
      fwrite(input.data(), 1, input.size(), file);
      fclose(file);
    }
    LLVMFuzzerTestOneInput(input.data(), input.size());
  }
  printf("%zu files and %ld random inputs: all good\n", corpus.size(), runs);
  return 0;
}
