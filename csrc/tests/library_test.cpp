// Runs every exported function of the CPU library on ragged inputs in buffers of exactly the right size, so that
// AddressSanitizer and UBSan see each read and write, and checks what needs no reference: float against double, the
// gradient of the values against differences, one thread against four, and every instruction set against the first.
//
//   python csrc/tests/sanitize.py
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <random>
#include <string>
#include <vector>

#include "sne_fast/cpu_abi.h"
#include "tests/bfloat16.h"

namespace {

int failures = 0;

void expect(bool good, const std::string &what) {
  if (good) return;
  ++failures;
  printf("FAILED %s\n", what.c_str());
}

using Reals = std::vector<double>;

Reals random_reals(size_t n, double gain, unsigned seed, double mean = 0) {
  std::mt19937 g(seed);
  std::normal_distribution<double> d(mean, gain);
  Reals r(n);
  for (double &x : r) x = d(g);
  return r;
}

double error(const Reals &a, const Reals &b) {
  double difference = 0, size = 1e-30;
  for (size_t i = 0; i < a.size(); ++i) {
    difference += (a[i] - b[i]) * (a[i] - b[i]);
    size += b[i] * b[i];
  }
  return sqrt(difference / size);
}

std::vector<int64_t> pointers(const std::vector<int64_t> &lengths) {
  std::vector<int64_t> p(1, 0);
  for (int64_t n : lengths) p.push_back(p.back() + n);
  return p;
}

// A copy in the dtype under test, in a block of exactly its size.
template <class T>
std::vector<T> as(const Reals &r) {
  return std::vector<T>(r.begin(), r.end());
}
template <class T>
Reals back(const std::vector<T> &v) {
  return Reals(v.begin(), v.end());
}

struct ChunkCase {
  int64_t h, H, rows;
  bool norms;
  std::vector<int64_t> chunk_ptr, tensor_ptr;
  std::vector<Reals> inputs;  // values and the ten parameters, in the order of the ABI
  Reals grad;

  ChunkCase(int64_t h_, int64_t H_, const std::vector<int64_t> &lengths, bool norms_) : h(h_), H(H_), norms(norms_) {
    chunk_ptr = pointers(lengths);
    const int64_t N = int64_t(lengths.size());
    tensor_ptr = {0, N / 3, N / 3, N};
    rows = 1;
    for (int64_t n : lengths) rows = n > rows ? n : rows;
    const double gain = 1 / sqrt(double(h));
    const size_t u = size_t(h), s = size_t(H);
    inputs = {random_reals(size_t(chunk_ptr.back()), 1, 1),
              random_reals(3 * u, 1, 2),
              random_reals(size_t(rows) * u, 1, 3),
              random_reals(2 * s, 1, 4),
              random_reals(3 * u, 1, 5),
              random_reals(9 * u * u, gain, 6),
              random_reals(9 * u, .1, 7),
              random_reals(4 * u * u, gain, 8),
              random_reals(4 * u, .1, 9),
              norms ? random_reals(16 * u, .3, 10, 1) : Reals(),
              random_reals(s * u, .3, 11)};
    grad = random_reals(size_t(N) * s * u, 1, 12);
  }

  template <class T>
  std::vector<Reals> run(int threads, int dtype = dtype_of<T>()) const {
    std::vector<std::vector<T>> in;
    for (const Reals &r : inputs) in.push_back(as<T>(r));
    const int64_t N = int64_t(chunk_ptr.size()) - 1;
    sne_fast_chunk_encode_args a = {};
    a.num_chunks = N, a.num_tensors = 3, a.num_values = chunk_ptr.back(), a.hidden = h, a.heads = H;
    a.element_rows = rows, a.layer_norm = norms, a.num_threads = threads;
    a.chunk_ptr = chunk_ptr.data(), a.tensor_ptr = tensor_ptr.data();
    const void **fields[] = {&a.values, &a.row_code, &a.element_code, &a.logit, &a.basis,     &a.w_qkv,
                             &a.b_qkv,  &a.w_o,      &a.b_o,          &a.norm,  &a.pool_query};
    for (int i = 0; i < 11; ++i) *fields[i] = in[size_t(i)].data();
    std::vector<T> out(grad.size()), g = as<T>(grad);
    expect(sne_fast_cpu_chunk_encode(dtype, &a, out.data()) == SNE_FAST_OK, "chunk_encode status");
    std::vector<std::vector<T>> grads;
    for (const Reals &r : inputs) grads.emplace_back(r.size());
    sne_fast_chunk_encode_grads b = {};
    b.grad = g.data();
    void **targets[] = {&b.values, &b.row_code, &b.element_code, &b.logit, &b.basis,     &b.w_qkv,
                        &b.b_qkv,  &b.w_o,      &b.b_o,          &b.norm,  &b.pool_query};
    for (int i = 0; i < 11; ++i) *targets[i] = grads[size_t(i)].data();
    expect(sne_fast_cpu_chunk_encode_backward(dtype, &a, &b) == SNE_FAST_OK, "chunk_encode_backward status");
    std::vector<Reals> results = {back(out)};
    for (const auto &t : grads) results.push_back(back(t));
    return results;
  }
  std::vector<Reals> run_bf16(int threads) const { return run<float>(threads, SNE_FAST_BF16); }
};

struct SetCase {
  int64_t h, H;
  std::vector<int64_t> q_ptr, k_ptr;
  Reals q, k, v, grad;
  SetCase(int64_t h_, int64_t H_, const std::vector<int64_t> &nq, const std::vector<int64_t> &nk)
      : h(h_), H(H_), q_ptr(pointers(nq)), k_ptr(pointers(nk)) {
    q = random_reals(size_t(q_ptr.back() * h), 2, 21);
    k = random_reals(size_t(k_ptr.back() * h), 2, 22);
    v = random_reals(size_t(k_ptr.back() * h), 1, 23);
    grad = random_reals(q.size(), 1, 24);
  }
  template <class T>
  std::vector<Reals> run(int threads) const {
    auto qq = as<T>(q), kk = as<T>(k), vv = as<T>(v), g = as<T>(grad);
    std::vector<T> out(q.size()), gq(q.size()), gk(k.size()), gv(v.size());
    std::vector<typename SumOf<T>::type> lse(size_t(q_ptr.back() * H));
    sne_fast_set_attention_args a = {int64_t(q_ptr.size()) - 1,
                                     q_ptr.back(),
                                     k_ptr.back(),
                                     h,
                                     H,
                                     threads,
                                     q_ptr.data(),
                                     k_ptr.data(),
                                     qq.data(),
                                     kk.data(),
                                     vv.data(),
                                     out.data(),
                                     lse.data()};
    expect(sne_fast_cpu_set_attention(dtype_of<T>(), &a) == SNE_FAST_OK, "set_attention status");
    sne_fast_set_attention_grads b = {g.data(), gq.data(), gk.data(), gv.data()};
    expect(sne_fast_cpu_set_attention_backward(dtype_of<T>(), &a, &b) == SNE_FAST_OK, "set_attention_backward status");
    return {back(out), back(gq), back(gk), back(gv)};
  }
  std::vector<Reals> run_bf16(int threads) const { return run<Bfloat16>(threads); }
};

struct BlockCase {
  int64_t h, H, dim_q, dim_k;
  bool norms;
  std::vector<int64_t> q_ptr, k_ptr;
  std::vector<Reals> inputs;  // the rows and the nine parameters, in the order of the ABI
  Reals grad;
  double beside = 0;

  BlockCase(int64_t h_, int64_t H_, int64_t dim_q_, int64_t dim_k_, bool norms_, const std::vector<int64_t> &nq,
            const std::vector<int64_t> &nk)
      : h(h_), H(H_), dim_q(dim_q_), dim_k(dim_k_), norms(norms_), q_ptr(pointers(nq)), k_ptr(pointers(nk)) {
    const size_t u = size_t(h), q = size_t(dim_q), k = size_t(dim_k);
    const double of_q = 1 / sqrt(double(q)), of_k = 1 / sqrt(double(k)), of_h = 1 / sqrt(double(h));
    inputs = {random_reals(size_t(q_ptr.back()) * q, 1, 61),
              random_reals(size_t(k_ptr.back()) * k, 1, 62),
              random_reals(u * q, of_q, 63),
              random_reals(u, .1, 64),
              random_reals(u * k, of_k, 65),
              random_reals(u, .1, 66),
              random_reals(u * k, of_k, 67),
              random_reals(u, .1, 68),
              random_reals(u * u, of_h, 69),
              random_reals(u, .1, 70),
              norms ? random_reals(4 * u, .3, 71, 1) : Reals()};
    grad = random_reals(size_t(q_ptr.back()) * u, 1, 72);
  }

  template <class T>
  std::vector<Reals> run(int threads, int dtype = dtype_of<T>()) const {
    std::vector<std::vector<T>> in, grads;
    for (const Reals &r : inputs) in.push_back(as<T>(r)), grads.emplace_back(r.size());
    std::vector<T> out(grad.size()), g = as<T>(grad);
    sne_fast_set_block_args a = {};
    a.num_sets = int64_t(q_ptr.size()) - 1, a.rows_q = q_ptr.back(), a.rows_k = k_ptr.back();
    a.dim_q = dim_q, a.dim_k = dim_k, a.hidden = h, a.heads = H, a.layer_norm = norms, a.num_threads = threads;
    a.q_ptr = q_ptr.data(), a.k_ptr = k_ptr.data(), a.out = out.data();
    const void **fields[] = {&a.q, &a.k, &a.w_q, &a.b_q, &a.w_k, &a.b_k, &a.w_v, &a.b_v, &a.w_o, &a.b_o, &a.norm};
    sne_fast_set_block_grads b = {};
    b.grad = g.data();
    void **targets[] = {&b.q, &b.k, &b.w_q, &b.b_q, &b.w_k, &b.b_k, &b.w_v, &b.b_v, &b.w_o, &b.b_o, &b.norm};
    for (size_t i = 0; i < 11; ++i) *fields[i] = in[i].data(), *targets[i] = grads[i].data();
    expect(sne_fast_cpu_set_block(dtype, &a) == SNE_FAST_OK, "set_block status");
    expect(sne_fast_cpu_set_block_backward(dtype, &a, &b) == SNE_FAST_OK, "set_block_backward status");
    std::vector<Reals> results = {back(out)};
    for (const auto &t : grads) results.push_back(back(t));
    // The gradient of b_k is zero but for rounding: beside one, its error is no relative one.
    for (double &x : results[6]) x += beside;
    return results;
  }
  std::vector<Reals> run_bf16(int threads) const { return run<float>(threads, SNE_FAST_BF16); }
};

struct PoolCase {
  int64_t h, A;
  std::vector<int64_t> ptr;
  Reals x, logits, grad;
  PoolCase(int64_t h_, int64_t A_, const std::vector<int64_t> &n) : h(h_), A(A_), ptr(pointers(n)) {
    x = random_reals(size_t(ptr.back() * h), 1, 31);
    logits = random_reals(size_t(ptr.back() * A), 2, 32);
    grad = random_reals(n.size() * size_t(A * h), 1, 33);
  }
  template <class T>
  std::vector<Reals> run(int threads) const {
    auto xx = as<T>(x), ll = as<T>(logits), g = as<T>(grad);
    const int64_t S = int64_t(ptr.size()) - 1;
    std::vector<T> out(grad.size()), gx(x.size()), gl(logits.size());
    std::vector<typename SumOf<T>::type> lse(size_t(S * A));
    sne_fast_segment_pool_args a = {S,          ptr.back(), h,         A,          threads,
                                    ptr.data(), xx.data(),  ll.data(), out.data(), lse.data()};
    expect(sne_fast_cpu_segment_pool(dtype_of<T>(), &a) == SNE_FAST_OK, "segment_pool status");
    sne_fast_segment_pool_grads b = {g.data(), gx.data(), gl.data()};
    expect(sne_fast_cpu_segment_pool_backward(dtype_of<T>(), &a, &b) == SNE_FAST_OK, "segment_pool_backward status");
    return {back(out), back(gx), back(gl)};
  }
  std::vector<Reals> run_bf16(int threads) const { return run<Bfloat16>(threads); }
};

struct GatherCase {
  std::vector<int64_t> shapes = {7, 9, 130, 33, 5, 1, 300, 1};
  template <class T>
  std::vector<Reals> run(int threads) const {
    std::vector<float> m0 = as<float>(random_reals(63, 1, 41)), m3 = as<float>(random_reals(300, 1, 42));
    std::vector<double> m1 = random_reals(130 * 33, 1, 43);
    std::vector<uint16_t> m2 = {0x3c00, 0x0001, 0x8400, 0x7bff, 0x4200};
    void *matrices[] = {m0.data(), m1.data(), m2.data(), m3.data()};
    int32_t dtypes[] = {SNE_FAST_F32, SNE_FAST_F64, SNE_FAST_F16, SNE_FAST_F32};
    double scale[] = {1, 2, 1, 3}, scale_grad[4];
    const int64_t V = 63 + 130 * 33 + 5 + 300;
    std::vector<T> values(static_cast<size_t>(V)), g(static_cast<size_t>(V), T(1));
    sne_fast_gather_chunks_args a = {4,        V,     threads,       shapes.data(), dtypes,
                                     matrices, scale, values.data(), g.data(),      scale_grad};
    expect(sne_fast_cpu_gather_chunks(dtype_of<T>(), &a) == SNE_FAST_OK, "gather_chunks status");
    expect(sne_fast_cpu_gather_chunks_backward(dtype_of<T>(), &a) == SNE_FAST_BAD_DTYPE, "half gradients are refused");
    std::vector<float> m2f(5);
    matrices[2] = m2f.data(), dtypes[2] = SNE_FAST_F32;
    expect(sne_fast_cpu_gather_chunks_backward(dtype_of<T>(), &a) == SNE_FAST_OK, "gather_chunks_backward status");
    return {back(values), back(m0), m1, Reals(scale_grad, scale_grad + 4)};
  }
};

template <class Case>
void exercise(const std::string &name, const Case &c, double tolerance, std::vector<Reals> *first) {
  const std::string what = name + " " + sne_fast_cpu_isa();
  const auto truth = c.template run<double>(1), threads = c.template run<double>(4), single = c.template run<float>(2);
  for (size_t i = 0; i < truth.size(); ++i) {
    const std::string which = what + " result " + std::to_string(i);
    expect(truth[i] == threads[i], which + ": other bits with four threads");
    expect(!(error(single[i], truth[i]) > tolerance), which + ": float32 far from float64");
    for (double x : truth[i]) {
      if (isfinite(x)) continue;
      expect(false, which + ": not finite");
      break;
    }
    if (!first->empty()) expect(error(truth[i], (*first)[i]) < 1e-11, which + ": differs from the portable kernels");
  }
  if (first->empty()) *first = truth;
}

// Products of bfloat16: the same bits for any number of threads, near float64 in what rounding moves little, and for
// tiles of AMX no farther from it than by vdpbf16ps in any result.
template <class Case>
void exercise_bf16(const std::string &name, const Case &c, std::vector<Reals> *first) {
  const std::string what = name + " in bfloat16 " + sne_fast_cpu_isa();
  const auto truth = c.template run<double>(1), got = c.run_bf16(1), threads = c.run_bf16(4);
  expect(got == threads, what + ": other bits with four threads");
  expect(!(error(got[0], truth[0]) > 5e-2), what + ": far from float64");
  for (size_t i = 0; i < got.size() && !first->empty(); ++i) {
    const double lost = error(got[i], truth[i]), allowed = error((*first)[i], truth[i]);
    const double factor = got[i].size() < 64 ? 4 : 1.5;  // errors of a few numbers may happen to be small
    expect(!(lost > factor * allowed + 1e-6), what + ": farther from float64 than avx512_bf16 " + std::to_string(i) +
                                                  " " + std::to_string(lost) + " " + std::to_string(allowed));
  }
  if (first->empty()) *first = got;
}

// <grad, f(x + t d) - f(x - t d)> / 2t against <gradient, d> for the values and every parameter.
template <class Case>
void differences(const Case &c) {
  const auto results = c.template run<double>(2);
  for (size_t i = 0; i < c.inputs.size(); ++i) {
    const Reals d = random_reals(c.inputs[i].size(), 1, 50 + unsigned(i));
    double want = 0, got = 0;
    for (size_t j = 0; j < d.size(); ++j) want += results[i + 1][j] * d[j];
    for (int sign : {1, -1}) {
      Case moved = c;
      for (size_t j = 0; j < d.size(); ++j) moved.inputs[i][j] += sign * 1e-6 * d[j];
      const Reals out = moved.template run<double>(2)[0];
      for (size_t j = 0; j < out.size(); ++j) got += sign * out[j] * c.grad[j] / 2e-6;
    }
    expect(fabs(got - want) <= 1e-5 * fabs(want) + 1e-6, "difference quotient of input " + std::to_string(i));
  }
}

}  // namespace

int main() {
  expect(sne_fast_cpu_abi() == SNE_FAST_CPU_ABI, "ABI number");
  expect(sne_fast_cpu_select_isa("mmx") == SNE_FAST_BAD_ISA, "an unknown instruction set is refused");
  const std::vector<ChunkCase> chunk_cases = {{64, 4, {32, 32, 32, 1, 2, 31, 5, 17, 16, 1, 32, 0, 3}, true},
                                              {64, 4, {32, 1, 31}, false},
                                              {32, 4, {1, 1, 1, 2, 3, 100, 9}, true},
                                              {128, 2, {256, 33}, true},
                                              {256, 32, {20, 40}, true},
                                              {32, 1, {}, true}};
  const std::vector<SetCase> set_cases = {{64, 4, {1, 3, 17, 40, 100, 0, 5}, {2, 3, 17, 0, 150, 4, 65}},
                                          {32, 1, {33}, {16}},
                                          {256, 32, {5}, {70}},
                                          {64, 8, {}, {}}};
  const std::vector<PoolCase> pool_cases = {{64, 4, {1, 2, 0, 70, 5000}}, {32, 1, {9}}, {48, 3, {17}}, {64, 4, {}}};
  // The first has matrices that are packed and several slices, the others do not.
  const std::vector<BlockCase> block_cases = {
      {32, 4, 32, 32, true, {900, 3, 0, 200, 1, 40}, {300, 3, 5, 900, 1, 40}},
      {64, 4, 16, 32, false, {1, 3, 17, 40, 100, 0, 5}, {2, 3, 17, 0, 150, 4, 65}},
      {256, 32, 64, 256, true, {5}, {70}},
      {64, 8, 64, 64, true, {}, {}},
      {64, 4, 96, 64, false, {150, 3, 0, 70}, {90, 3, 5, 64}},
      {128, 8, 64, 128, true, {200}, {70}}};
  const GatherCase gather;
  std::vector<std::vector<Reals>> first(chunk_cases.size() + set_cases.size() + pool_cases.size() + block_cases.size() +
                                        1);
  std::vector<std::vector<Reals>> first_bf16(first.size());
  for (const char *isa : {"portable", "avx2", "avx512", "avx512_bf16", "amx_bf16"}) {
    if (!sne_fast_cpu_has_isa(isa)) {
      printf("%s: not on this machine\n", isa);
      continue;
    }
    expect(sne_fast_cpu_select_isa(isa) == SNE_FAST_OK && !strcmp(sne_fast_cpu_isa(), isa), isa);
    if (strstr(isa, "bf16")) {
      size_t i = 0;
      for (const ChunkCase &c : chunk_cases) exercise_bf16("chunk_encode", c, &first_bf16[i++]);
      for (const SetCase &c : set_cases) exercise_bf16("set_attention", c, &first_bf16[i++]);
      for (const PoolCase &c : pool_cases)
        if (c.h % 32 == 0) exercise_bf16("segment_pool", c, &first_bf16[i++]);
      for (BlockCase c : block_cases) {
        c.beside = 1;
        exercise_bf16("set_block", c, &first_bf16[i++]);
      }
      expect(sne_fast_cpu_product_rate(SNE_FAST_BF16, 100, 64, 192, 2, 2) == SNE_FAST_OK, "product_rate in bfloat16");
      printf("%s: done\n", isa);
      continue;  // for float and double it has the kernels of avx512
    }
    expect(sne_fast_cpu_product_rate(SNE_FAST_BF16, 1, 64, 64, 1, 1) == SNE_FAST_BAD_DTYPE, "bfloat16 is refused");
    size_t i = 0;
    for (const ChunkCase &c : chunk_cases) exercise("chunk_encode", c, 1e-4, &first[i++]);
    for (const SetCase &c : set_cases) exercise("set_attention", c, 1e-4, &first[i++]);
    for (const PoolCase &c : pool_cases) exercise("segment_pool", c, 1e-4, &first[i++]);
    for (BlockCase c : block_cases) {
      c.beside = 1;
      exercise("set_block", c, 1e-4, &first[i++]);
    }
    exercise("gather_chunks", gather, 1e-4, &first[i++]);
    for (bool norms : {true, false}) {
      differences(ChunkCase(32, 2, {5, 1, 16}, norms));
      differences(BlockCase(32, 2, 16, 48, norms, {5, 1, 0, 9}, {3, 0, 2, 70}));
    }
    expect(sne_fast_cpu_product_rate(SNE_FAST_F32, 100, 64, 192, 2, 2) == SNE_FAST_OK, "product_rate status");
    ChunkCase broken(64, 4, {5, 6}, true);
    broken.chunk_ptr[1] = 100;
    sne_fast_chunk_encode_args a = {};
    a.num_chunks = 2, a.num_tensors = 3, a.num_values = 11, a.hidden = 64, a.heads = 4, a.element_rows = 6;
    a.chunk_ptr = broken.chunk_ptr.data(), a.tensor_ptr = broken.tensor_ptr.data();
    expect(sne_fast_cpu_chunk_encode(SNE_FAST_F32, &a, nullptr) == SNE_FAST_BAD_ARGUMENT, "bad pointers are refused");
    a.hidden = 48;
    expect(sne_fast_cpu_chunk_encode(SNE_FAST_F32, &a, nullptr) == SNE_FAST_BAD_ARGUMENT, "width 48 is refused");
    printf("%s: done\n", isa);
  }
  printf(failures ? "%d failures\n" : "all good\n", failures);
  return failures ? 1 : 0;
}
