// Backward of the pooling of chunk_encode, and the sums of its codes' gradients.
//
// All products are of vectors: lanes are rows for the softmax, and pairs of columns where rows are written.
#include "cuda/chunk_encode/backward.h"
#include "cuda/chunk_encode/operands.h"
#include "cuda/ptx/vectors.h"

namespace sne {
namespace {

// Memory of a warp, which has 32 slots. Per row and head: the weight, and the gradient of the logit.
struct PoolSlots {
  Slot *slots;
  float *weight, *slope;
  SNE_MEMBER PoolSlots(unsigned char *at, int warps, int warp, int heads) {
    slots = (Slot *)at + warp * 32;
    at += warps * 32 * int(sizeof(Slot));
    weight = (float *)at + warp * 32 * heads;
    at += warps * 32 * heads * 4;
    slope = (float *)at + warp * 32 * heads;
  }
  static SNE_HOST_DEVICE int64_t bytes(int64_t heads) { return 32 * (int64_t(sizeof(Slot)) + 8 * heads); }
};

// Returns the dot product of two rows of `width` values, a multiple of 32, at multiples of 16 bytes.
template <class T>
SNE_DEVICE float dot(const T *row, const T *v, int width) {
  float sum = 0;
  SNE_LOOP
  for (int c = 0; c < width; c += 2 * kVector<T>) {
    SNE_UNROLL
    for (int part = 0; part < 2; ++part) {
      float a[kVector<T>], b[kVector<T>];
      unpack<T>(a, load_words(row + c + part * kVector<T>));
      unpack<T>(b, load_words(v + c + part * kVector<T>));
      SNE_UNROLL
      for (int i = 0; i < kVector<T>; ++i) sum = multiply_add(a[i], b[i], sum);
    }
  }
  return sum;
}

template <int count>
SNE_DEVICE void load_floats(float (&out)[count], const float *at) {
  if constexpr (count == 4) {
    const Words words = load_words(at);
    SNE_UNROLL
    for (int i = 0; i < 4; ++i) out[i] = float_of_bits(words.w[i]);
  } else {
    SNE_UNROLL
    for (int i = 0; i < count; ++i) out[i] = at[i];
  }
}
template <class T>
SNE_DEVICE void load_pair(float (&out)[2], const T *at) {
  if constexpr (sizeof(T) == 2) {
    const uint32_t pair = *(const uint32_t *)at;
    out[0] = to_real(T{uint16_t(pair)}), out[1] = to_real(T{uint16_t(pair >> 16)});
  } else {
    out[0] = at[0], out[1] = at[1];
  }
}

// Writes the gradient of 32 rows and adds that of the queries to query_sums (H, h): from the weights and the gradients
// of the logits, (32, H) each. A lane has two columns, and takes `group` heads at a time.
template <int group, class T>
SNE_DEVICE void spread_grads(const PoolSlots &own, const T *rows, const T *grad, const T *query, int width, int heads,
                             float *query_sums, float *rows_grad) {
  SNE_LOOP
  for (int column = 2 * lane_id(); column < width; column += 64) {
    SNE_LOOP
    for (int head = 0; head < heads; head += group) {
      float by_slope[group][2], by_weight[group][2] = {}, query_sum[group][2] = {};
      SNE_UNROLL
      for (int a = 0; a < group; ++a) load_pair(by_slope[a], query + (head + a) * width + column);
      int64_t held = -1;  // the chunk of by_weight
      SNE_LOOP
      for (int i = 0; i < 32; ++i) {
        const int64_t chunk = own.slots[i].chunk;
        float sum[2] = {0, 0}, *to = rows_grad + i * width + column;
        if (head) sum[0] = to[0], sum[1] = to[1];
        if (chunk >= 0) {
          if (chunk != held) {
            SNE_UNROLL
            for (int a = 0; a < group; ++a) load_pair(by_weight[a], grad + (chunk * heads + head + a) * width + column);
            held = chunk;
          }
          float value[2], weight[group], slope[group];
          load_pair(value, rows + i * width + column);
          load_floats(weight, own.weight + i * heads + head);
          load_floats(slope, own.slope + i * heads + head);
          SNE_UNROLL
          for (int a = 0; a < group; ++a) {
            SNE_UNROLL
            for (int e = 0; e < 2; ++e) {
              sum[e] += weight[a] * by_weight[a][e] + slope[a] * by_slope[a][e];
              query_sum[a][e] += slope[a] * value[e];
            }
          }
        }
        to[0] = sum[0], to[1] = sum[1];
      }
      SNE_UNROLL
      for (int a = 0; a < group; ++a) {
        float *to = query_sums + (head + a) * width + column;
        to[0] += query_sum[a][0], to[1] += query_sum[a][1];
      }
    }
  }
}

// grad (N, H, h) -> rows_grad; query_part (multiprocessors, H, h).
template <class T>
SNE_KERNEL SNE_BOUNDS(256, 2) chunk_pool_backward(ChunkCall<T> call, const T *grad, const T *x, float *rows_grad,
                                                  int width, int heads, float *query_part) {
  float *sums = (float *)shared_memory();  // of each warp, (H, h)
  const PoolSlots own((unsigned char *)(sums + num_warps() * heads * width), num_warps(), warp_id(), heads);
  float *query_sums = sums + warp_id() * heads * width;
  clear(sums, num_warps() * heads * width);
  sync_block();
  const SetOfWarps set = set_of_warps(call.cls, 32);
  const int lane = lane_id();
  const int64_t per_step = num_warps() / set.warps;
  for (int64_t step = block_id(); step * per_step < call.count; step += num_blocks()) {
    const int64_t local = step * per_step + warp_id() / set.warps;
    const bool there = local < call.count;
    const Chunks chunks = chunks_of_bin(call, local);
    const Slot slot = slot_of(chunks, call.order, set.part * 32 + lane);
    own.slots[lane] = slot;
    const int64_t row = local * call.cls.slots + set.part * 32;
    const T *rows = x + (there ? row : 0) * width;  // lanes without an element read what they do not use
    const bool real = slot.chunk >= 0;
    SNE_LOOP
    for (int a = 0; a < heads; ++a) {
      const float product = dot(rows + lane * width, call.pool_query + a * width, width);
      own.weight[lane * heads + a] = real ? product : 0.0f;
    }
    set.sync();
    const float *weight = own.weight - set.part * 32 * heads, *slope = own.slope - set.part * 32 * heads;
    // The softmax of the own row needs all logits of its chunk; weights replace logits once all lanes have read them.
    for (int a = 0; a < heads; ++a) {
      float top = -INFINITY, total = 0;
      for (int j = slot.key_begin; j < slot.key_end; ++j) top = max_of(top, weight[j * heads + a]);
      if (top == -INFINITY) top = 0;
      for (int j = slot.key_begin; j < slot.key_end; ++j) total += exp2_fast((weight[j * heads + a] - top) * kLog2e);
      own.slope[lane * heads + a] = real ? exp2_fast((own.weight[lane * heads + a] - top) * kLog2e) / total : 0.0f;
    }
    set.sync();
    for (int a = 0; a < heads; ++a) own.weight[lane * heads + a] = own.slope[lane * heads + a];
    set.sync();
    const T *pulled = grad + (real ? slot.chunk : 0) * heads * width;
    SNE_LOOP
    for (int a = 0; a < heads; ++a) {
      const float product = dot(rows + lane * width, pulled + a * width, width);
      own.slope[lane * heads + a] = real ? product : 0.0f;
    }
    set.sync();
    for (int a = 0; a < heads; ++a) {
      float mean = 0;
      for (int j = slot.key_begin; j < slot.key_end; ++j) mean += weight[j * heads + a] * slope[j * heads + a];
      // Up to here other lanes of the chunk read this lane's slope.
      set.sync();
      const float p = own.weight[lane * heads + a];
      own.slope[lane * heads + a] = real ? p * (own.slope[lane * heads + a] - mean) : 0.0f;
    }
    sync_warp();
    if (there) {
      float *to = rows_grad + row * width;
      if (heads < 4) {
        if (heads == 2)
          spread_grads<2>(own, rows, grad, call.pool_query, width, heads, query_sums, to);
        else
          spread_grads<1>(own, rows, grad, call.pool_query, width, heads, query_sums, to);
      } else {
        spread_grads<4>(own, rows, grad, call.pool_query, width, heads, query_sums, to);
      }
    }
    set.sync();
  }
  add_warp_sums(query_part + block_id() * heads * width, sums, heads * width);
}

// Sums rows_grad over each chunk to chunk_grad (N, h). A warp has a bin, and its lanes have columns.
template <class T>
SNE_KERNEL SNE_BOUNDS(256, 4) chunk_row_sums(ChunkCall<T> call, const float *rows_grad, int width, float *chunk_grad) {
  for (int64_t first = block_id() * num_warps(); first < call.count; first += num_blocks() * num_warps()) {
    const int64_t local = first + warp_id();
    const Chunks chunks = chunks_of_bin(call, local);
    for (int group = 0; group < chunks.count; ++group) {
      const float *rows = rows_grad + (local * call.cls.slots + group * chunks.length) * width;
      float *to = chunk_grad + call.order[chunks.first + group] * width;
      for (int c = lane_id(); c < width; c += 32) {
        float sum = 0;
        for (int i = 0; i < chunks.length; ++i) sum += rows[int64_t(i) * width + c];
        to[c] = sum;
      }
    }
  }
}

// Adds the sums of rows_grad over element e of all chunks to element_part (multiprocessors, codes, h), where a bin
// holds one chunk: element e is row e, and the gradients of parked rows are zeros. A thread has four columns of a row.
SNE_KERNEL SNE_BOUNDS(256, 4) chunk_row_element_sums(const float *rows_grad, int64_t count, int slots, int width,
                                                     int codes, float *element_part) {
  const int at = (int(block_id(1)) * num_threads() + thread_id()) * 4;
  if (at >= slots * width || at / width >= codes) return;
  float sum[4] = {0, 0, 0, 0};
  SNE_UNROLL_BY(4)
  for (int64_t bin = block_id(); bin < count; bin += num_blocks()) {
    const Words row = load_words(rows_grad + bin * slots * width + at);
    SNE_UNROLL
    for (int e = 0; e < 4; ++e) sum[e] += float_of_bits(row.w[e]);
  }
  float *to = element_part + block_id() * codes * width + at;
  SNE_UNROLL
  for (int e = 0; e < 4; ++e) to[e] += sum[e];
}

// The same where a bin holds several chunks. A thread block walks its bins once for every element.
template <class T>
SNE_KERNEL SNE_BOUNDS(256, 4)
    chunk_element_sums(ChunkCall<T> call, const float *rows_grad, int width, int codes, float *element_part) {
  for (int element = int(block_id(1)) * num_warps() + warp_id(); element < kMaxMultiLength;
       element += int(num_blocks(1)) * num_warps())
    for (int c = lane_id(); c - lane_id() < width; c += 32) {
      float sum = 0;
      bool any = false;
      for (int64_t local = block_id(); local < call.count; local += num_blocks()) {
        const Chunks chunks =
            find_chunks(call.table, call.order, call.chunk_ptr, call.cls, call.first_bin + local, call.bins);
        if (element >= chunks.length || !chunks.count) continue;
        any = true;
        for (int group = 0; group < chunks.count; ++group)
          sum += rows_grad[(local * call.cls.slots + group * chunks.length + element) * width + c];
      }
      if (any) element_part[(block_id() * codes + element) * width + c] += sum;
    }
}

template <class T>
int run_pool(const sne_fast_cuda_chunk_args &a, const ChunkSpace &space, const void *grad, float *part, Stream stream) {
  const int64_t sets = a.slots / 32, per_warp = PoolSlots::bytes(a.heads) + a.heads * a.hidden * 4;
  int64_t warps = a.shared_limit / per_warp;
  warps = warps > 8 ? 8 : warps / sets * sets;
  if (!warps) return SNE_FAST_CUDA_BAD_VARIANT;
  const int64_t tiles = (a.count * sets + warps - 1) / warps;
  const T *x = (const T *)space.saved + 3 * a.count * a.slots * a.hidden;
  const int64_t blocks = SNE_FAST_CUDA_POOL_BLOCKS * a.multiprocessors;
  return launch(stream, tiles < blocks ? tiles : blocks, 1, int(32 * warps), warps * per_warp, chunk_pool_backward<T>,
                call_of<T>(a), (const T *)grad, x, space.rows_grad, int(a.hidden), int(a.heads), part);
}

template <class T>
int run_codes(const sne_fast_cuda_chunk_args &a, const ChunkSpace &space, int64_t codes, float *chunk_grad, float *part,
              Stream stream) {
  const int64_t tiles = (a.count + 7) / 8;
  const int status = launch(stream, tiles < 8 * a.multiprocessors ? tiles : 8 * a.multiprocessors, 1, 256, 0,
                            chunk_row_sums<T>, call_of<T>(a), space.rows_grad, int(a.hidden), chunk_grad);
  if (status) return status;
  const int64_t blocks = a.count < a.multiprocessors ? a.count : a.multiprocessors;
  if (a.multi_chunk)
    return launch(stream, blocks, 2, 256, 0, chunk_element_sums<T>, call_of<T>(a), space.rows_grad, int(a.hidden),
                  int(codes), part);
  return launch(stream, blocks, (a.slots * a.hidden + 1023) / 1024, 256, 0, chunk_row_element_sums, space.rows_grad,
                a.count, int(a.slots), int(a.hidden), int(codes), part);
}

}  // namespace
}  // namespace sne

extern "C" int sne_fast_cuda_chunk_pool_backward(int precision, const sne_fast_cuda_chunk_args *a,
                                                 const sne_fast_cuda_chunk_space *space, const void *grad,
                                                 float *query_part, void *stream) {
  using namespace sne;
  if (!valid(*a)) return SNE_FAST_CUDA_BAD_ARGUMENT;
  if (all_full(*a))
    return with_half_operands(precision, [&](auto op) {
      return FullBackward<decltype(op)>::pool(*a, *space, grad, query_part, (Stream)stream);
    });
  return with_storage(precision, [&](auto value) {
    return run_pool<decltype(value)>(*a, space_of(*space), grad, query_part, (Stream)stream);
  });
}

extern "C" int sne_fast_cuda_chunk_codes_backward(int precision, const sne_fast_cuda_chunk_args *a,
                                                  const sne_fast_cuda_chunk_space *space, int64_t codes,
                                                  float *chunk_grad, float *element_part, void *stream) {
  using namespace sne;
  if (!valid(*a)) return SNE_FAST_CUDA_BAD_ARGUMENT;
  if (all_full(*a))
    return with_half_operands(precision, [&](auto op) {
      return FullBackward<decltype(op)>::codes(*a, *space, codes, chunk_grad, element_part, (Stream)stream);
    });
  return with_storage(precision, [&](auto value) {
    return run_codes<decltype(value)>(*a, space_of(*space), codes, chunk_grad, element_part, (Stream)stream);
  });
}
