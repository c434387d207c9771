// Sums of packed rows over segments in a fixed order: first over pieces of 256 rows (tiles/row_pieces.h), then over the
// pieces of each segment.
#include "cuda/tiles/row_pieces.h"
#include "sne_fast/cuda_abi.h"

namespace sne {
namespace {

constexpr int kBits = 8;
constexpr int64_t kPiece = 1 << kBits;

SNE_KERNEL SNE_BOUNDS(256, 4)
    sum_pieces(const float *rows, const int64_t *ptr, float *partial, int64_t segments, int width) {
  const int64_t piece_id = block_id();
  const SetPiece piece = find_piece(ptr, segments, piece_id, kBits);
  const int64_t end = piece.begin + kPiece < piece.end ? piece.begin + kPiece : piece.end;
  // A thread has one column. Where there are more threads than columns, groups of threads take different rows.
  const int column = thread_id() % width, row_group = thread_id() / width, row_groups = num_threads() / width;
  float *sums = (float *)shared_memory(), sum = 0;
  for (int64_t row = piece.begin + row_group; row < end; row += row_groups) sum += rows[row * width + column];
  sums[thread_id()] = sum;
  sync_block();
  if (row_group == 0) {
    for (int i = 1; i < row_groups; ++i) sum += sums[i * width + column];
    partial[piece_id * width + column] = sum;
  }
}

SNE_KERNEL SNE_BOUNDS(256, 4) sum_segments(const float *partial, const int64_t *ptr, float *out, int width) {
  const int64_t segment = block_id(), first = (ptr[segment] >> kBits) + segment;
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
  return launch((Stream)stream, a->segments, 1, a->width < 32 ? 32 : int(a->width), 0, sum_segments, partial, a->ptr,
                (float *)a->out, int(a->width));
}
