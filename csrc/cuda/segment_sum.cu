// Sums of packed rows over segments, in a fixed order: pieces of 256 rows first, then each segment's pieces.
//
// Segment s owns the slots ptr[s] / 256 + s up to, not including, ptr[s + 1] / 256 + s + 1: always enough for its pieces,
// at most one more, so there are rows / 256 + segments slots, known without a look at the pointers.
#include "cuda/simt.h"
#include "sne_fast/cuda_abi.h"

namespace sne {
namespace {

constexpr int64_t kPiece = 256;

SNE_DEVICE int64_t find_segment(const int64_t *ptr, int64_t segments, int64_t slot) {
  int64_t low = 0, high = segments;  // the last segment whose first slot is not after `slot`
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (ptr[middle] / kPiece + middle <= slot)
      low = middle;
    else
      high = middle;
  }
  return low;
}

SNE_KERNEL SNE_BOUNDS(256, 4)
    sum_pieces(const float *rows, const int64_t *ptr, float *partial, int64_t segments, int width) {
  const int64_t slot = block_id(), segment = find_segment(ptr, segments, slot);
  const int64_t first = ptr[segment] + (slot - (ptr[segment] / kPiece + segment)) * kPiece;
  const int64_t end = first + kPiece < ptr[segment + 1] ? first + kPiece : ptr[segment + 1];
  // Threads stand at a column each; where there are more threads than columns, they share out the rows.
  const int column = thread_id() % width, share = thread_id() / width, shares = num_threads() / width;
  float *sums = (float *)shared_memory(), sum = 0;
  for (int64_t row = first + share; row < end; row += shares) sum += rows[row * width + column];
  sums[thread_id()] = sum;
  sync_block();
  if (share == 0) {
    for (int i = 1; i < shares; ++i) sum += sums[i * width + column];
    partial[slot * width + column] = sum;
  }
}

SNE_KERNEL SNE_BOUNDS(256, 4) sum_slots(const float *partial, const int64_t *ptr, float *out, int width) {
  const int64_t segment = block_id(), first = ptr[segment] / kPiece + segment;
  const int64_t count = (ptr[segment + 1] - ptr[segment] + kPiece - 1) / kPiece;
  for (int column = thread_id(); column < width; column += num_threads()) {
    float sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += partial[(first + i) * width + column];
    out[segment * width + column] = sum;
  }
}

}  // namespace
}  // namespace sne

extern "C" int sne_fast_cuda_segment_sum(const sne_fast_segment_sum_args *a, void *stream) {
  using namespace sne;
  if (a->width < 1 || a->width > 256 || 256 % a->width || a->rows < 0) return SNE_FAST_CUDA_BAD_ARGUMENT;
  const float *partial = (const float *)a->partial;
  const int status = launch((Stream)stream, a->segments ? a->rows / kPiece + a->segments : 0, 1, 256, 1024, sum_pieces,
                            (const float *)a->x, a->ptr, (float *)a->partial, a->segments, int(a->width));
  if (status) return status;
  return launch((Stream)stream, a->segments, 1, a->width < 32 ? 32 : int(a->width), 0, sum_slots, partial, a->ptr,
                (float *)a->out, int(a->width));
}
