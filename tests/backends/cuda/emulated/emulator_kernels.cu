// Small kernels that show what the emulator notices, and products of fragments to compare with exact ones. nvcc
// compiles them as well (tests/backends/cuda/compiled).
#include "cuda/tiles/fragments.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace sne {

// Every thread passes its number on to the next one.
SNE_KERNEL pass_on(float *out, bool barrier) {
  float *shared = (float *)shared_memory();
  const int t = thread_id();
  shared[t] = float(t);
  if (barrier) sync_block();
  out[t] = shared[t ? t - 1 : 0];
}
EXPORT int race(float *out, int threads, int barrier) {
  return launch(nullptr, 1, 1, threads, threads * sizeof(float), pass_on, out, bool(barrier));
}

// The same between the two halves of a block that meet by themselves.
SNE_KERNEL pass_on_in_halves(float *out) {
  float *shared = (float *)shared_memory();
  const int t = thread_id(), half = num_threads() / 2, first = t / half * half;
  shared[t] = float(t);
  sync_named(1 + t / half, half);
  out[block_id() * num_threads() + t] = shared[first + (t - first + half - 1) % half];
}
EXPORT int halves(float *out, int threads, int blocks) {
  return launch(nullptr, blocks, 1, threads, threads * sizeof(float), pass_on_in_halves, out);
}

SNE_KERNEL read_unwritten(float *out) {
  out[block_id(1) * num_threads() + thread_id()] = ((float *)shared_memory())[thread_id()];
  ((float *)shared_memory())[thread_id()] = 0.0f;
}
EXPORT int unwritten(float *out, int threads, int blocks) {
  return launch(nullptr, 1, blocks, threads, threads * sizeof(float), read_unwritten, out);
}

SNE_KERNEL read_beyond(float *out, int bytes) { out[0] = float(((volatile char *)shared_memory())[bytes]); }
EXPORT int beyond(float *out, int bytes, int at) { return launch(nullptr, 1, 1, 32, bytes, read_beyond, out, at); }

// kind 0: a barrier of the block that half of it does not reach; 1: a shuffle that lanes of the warp do not reach;
// 2: lanes that wait at different calls.
SNE_KERNEL diverge(float *out, int kind) {
  const int t = thread_id();
  float v = float(t);
  if (kind == 0 && t < 32) sync_block();
  if (kind == 1 && t % 32 < 7) v = shuffle_xor(v, 1);
  if (kind == 2) {
    if (t % 2)
      sync_warp();
    else
      v = shuffle_xor(v, 1);
  }
  out[t] = v;
}
EXPORT int divergence(float *out, int threads, int kind) {
  return launch(nullptr, 1, 1, threads, 0, diverge, out, kind);
}

SNE_KERNEL exchange(float *summed, uint32_t *odd, float *from_three) {
  const int t = thread_id();
  float v = float(t);
  for (int mask = 16; mask; mask /= 2) v += shuffle_xor(v, mask);
  summed[t] = v;
  odd[t] = ballot(t % 2);
  from_three[t] = shuffle(float(t), 3);
}
EXPORT int exchanges(float *summed, uint32_t *odd, float *from_three, int threads) {
  return launch(nullptr, 1, 1, threads, 0, exchange, summed, odd, from_three);
}

// x (16, K), w (N, K): y = x w^T (16, N), the same from pairs of steps, over the first 8 columns of x alone, and
// z = x x^T x (16, K).
template <class Op>
SNE_KERNEL multiply(const float *x, const typename Op::Storage *w, float *y, float *paired, float *left, float *z,
                    int K, int N) {
  auto *shared = (typename Op::Storage *)shared_memory();
  for (int i = thread_id(); i < N * K; i += kWarp) shared[core_index<Op>(i / K, i % K, K)] = w[i];
  sync_block();
  const auto columns = [&](int k) { return rows16<Op>(load_tile(x + 16 * k, K), load_tile(x + 16 * k + 8, K)); };
  for (int n = 0; n < N / 8; ++n) {
    Tile once{}, twice{}, first{};
    for (int k = 0; k < K / 16; ++k) product(once, columns(k), load_cols8<Op>(shared, n, k, K));
    for (int k = 0; k < K / 32; ++k) {
      Cols8<Op> b[2];
      load_cols8_pair<Op>(b, shared, n, k, K);
      product(twice, columns(2 * k), b[0]);
      product(twice, columns(2 * k + 1), b[1]);
    }
    product_left(first, columns(0), load_cols8<Op>(shared, n, 0, K));
    store_tile(y + 8 * n, N, once);
    store_tile(paired + 8 * n, N, twice);
    store_tile(left + 8 * n, N, first);
  }
  Tile s[2] = {};
  for (int k = 0; k < K / 16; ++k)
    for (int half = 0; half < 2; ++half) product(s[half], columns(k), cols8<Op>(columns(k), half));
  for (int k = 0; k < K / 16; ++k)
    for (int half = 0; half < 2; ++half) {
      Tile sum{};
      product(sum, rows16<Op>(s[0], s[1]), cols8_transposed<Op>(columns(k), half));
      store_tile(z + 16 * k + 8 * half, K, sum);
    }
}
template <class Op>
static int multiplied(const float *x, const void *w, float *y, float *paired, float *left, float *z, int K, int N) {
  using T = typename Op::Storage;
  return launch(nullptr, 1, 1, kWarp, N * K * sizeof(T), multiply<Op>, x, (const T *)w, y, paired, left, z, K, N);
}
EXPORT int products(int op, const float *x, const void *w, float *y, float *paired, float *left, float *z, int K,
                    int N) {
  switch (op) {
    case 0: return multiplied<OpFloat>(x, w, y, paired, left, z, K, N);
    case 1: return multiplied<OpTf32>(x, w, y, paired, left, z, K, N);
    case 2: return multiplied<OpHalf>(x, w, y, paired, left, z, K, N);
    default: return multiplied<OpBfloat>(x, w, y, paired, left, z, K, N);
  }
}

// The 8 x 8 matrices of 16-bit numbers that ldmatrix reads, written out as (4, 8, 8) as its lanes hold them.
SNE_KERNEL load_four(const uint16_t *matrices, uint16_t *plain, uint16_t *transposed, uint16_t *moved) {
  uint16_t *shared = (uint16_t *)shared_memory();
  const int l = thread_id();
  copy_async(shared + 8 * l, matrices + 8 * l);
  copies_done();
  sync_block();
  uint32_t a[4], b[4];
  load_matrices<4>(a, shared + 8 * l);
  load_matrices_transposed<4>(b, shared + 8 * l);
  for (int m = 0; m < 4; ++m) {
    ((uint32_t *)plain)[32 * m + l] = a[m];
    ((uint32_t *)transposed)[32 * m + l] = b[m];
    ((uint32_t *)moved)[32 * m + l] = transpose8(a[m]);
  }
}
EXPORT int matrices(const uint16_t *in, uint16_t *plain, uint16_t *transposed, uint16_t *moved) {
  return launch(nullptr, 1, 1, kWarp, 512, load_four, in, plain, transposed, moved);
}

#if defined(SNE_EMULATED)

// Rounded to storage and back, in single and in pairs.
EXPORT void rounded(const float *in, float *half, float *bfloat, float *pairs, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    half[i] = to_real(from_float<Half>(in[i]));
    bfloat[i] = to_real(from_float<BFloat>(in[i]));
    pairs[i] = to_real(Half{uint16_t(pack2<Half>(0.0f, in[i]) >> 16)});
  }
}

EXPORT void schedule(uint64_t seed) { emulator::schedule(seed); }
EXPORT const char *error() { return emulator::error(); }

#endif

}  // namespace sne
