// gather_chunks: transposes, divides, casts and concatenates matrices of many types and sizes in one launch.
//
// A thread block moves one tile of one matrix through shared memory. The source is read in vectors of 16 bytes and
// scattered into rows of the target. Those rows have the same offset from a multiple of 16 bytes in shared memory as in
// the target, so that they are written in vectors of 16 bytes whatever the addresses are. Where a tile holds whole rows
// of the source (or of the target), these are one run of memory.
#include <type_traits>

#include "cuda/ptx/vectors.h"
#include "cuda/tiles/warp_search.h"
#include "sne_fast/cuda_abi.h"

namespace sne {
namespace {

constexpr int kThreads = 256, kInFlight = 4;  // loads of 16 bytes that a thread starts before it uses the first
template <class Acc>
constexpr int kBlocks = sizeof(Acc) == 8 ? 2 : 3;  // thread blocks on a multiprocessor
// Room for a tile of 4096 values in at most 64 rows, with what their alignment and avoiding bank conflicts take.
constexpr int kSharedValues = 64 * (64 + 22);

struct Job {
  const int64_t *table;  // (SNE_FAST_GATHER_FIELDS, stride)
  const void *scale;
  bool wide_scale;
  int64_t tensors, stride;

  SNE_MEMBER void *address(int64_t tensor) const {
    void *at = (void *)uintptr_t(field(SNE_FAST_GATHER_ADDRESS, tensor));
#if defined(__CUDA_ARCH__)
    __builtin_assume(__isGlobal(at));
#endif
    return at;
  }
  SNE_MEMBER int64_t field(int name, int64_t tensor) const { return table[name * stride + tensor]; }
  template <class Acc>
  SNE_MEMBER Acc divisor(int64_t tensor) const {
    const int64_t place = field(SNE_FAST_GATHER_PLACE, tensor);
    return wide_scale ? Acc(((const double *)scale)[place]) : Acc(((const float *)scale)[place]);
  }
};

// Returns the tensor that a tile belongs to.
SNE_DEVICE int64_t tensor_of_tile(const Job &job, int64_t tile) {
  return last_at_most(job.tensors, tile, [&](int64_t t) { return job.field(SNE_FAST_GATHER_FIRST_TILE, t); });
}

// A tile of a matrix (rows, columns) on its way into the transpose (columns, rows).
struct Shape {
  int64_t rows, columns, row, column;
  int height, width;
  bool whole_rows, whole_columns;

  SNE_MEMBER Shape(int64_t rows, int64_t columns, int64_t row, int64_t column, int64_t height, int64_t width)
      : rows(rows), columns(columns), row(row), column(column) {
    this->height = int(rows - row < height ? rows - row : height);
    this->width = int(columns - column < width ? columns - column : width);
    whole_rows = this->width == columns;
    whole_columns = this->height == rows;
  }
};

// Where the tile's value (i, j) stands in shared memory: row j of the target, behind what keeps its alignment.
struct Layout {
  int pitch, base, step, mask, pad;

  SNE_MEMBER Layout(const Shape &s, uintptr_t to, int log_size) {  // the target, whose values have 1 << log_size bytes
    const int vector = 16 >> log_size;
    const uint64_t first = (to >> log_size) + uint64_t(s.column * s.rows + s.row);
    mask = vector - 1;
    base = int(first) & mask;
    if (s.whole_columns) {
      pitch = s.height, step = 0, pad = 4;
    } else {
      const int align = vector < 4 ? 4 : vector;
      pitch = (s.height + mask + align - 1) / align * align;
      pitch += pitch / align % 2 ? 0 : align;
      step = int(s.rows) & mask, pad = 0;
    }
  }
  SNE_MEMBER int skew(int j) const { return (base + j * step) & mask; }
  SNE_MEMBER int padded(int at) const { return at + (at >> 5) * pad; }
  SNE_MEMBER int index(int i, int j) const { return padded(j * pitch + skew(j) + i); }
};

// Divides many values by one divisor, with correctly rounded quotients.
template <class Acc>
struct Divisor {
  Acc value;

  SNE_MEMBER explicit Divisor(Acc value) : value(value) {}
  template <int n>
  SNE_MEMBER void divide(Acc (&values)[n]) const {
    SNE_UNROLL
    for (int i = 0; i < n; ++i) values[i] = divide_exactly(values[i], value);
  }
};
// Multiplies by the rounded reciprocal and corrects twice. The first correction comes within one unit in the last
// place, so the second gives the correctly rounded quotient (Markstein), where nothing underflows and no zero has a
// sign.
template <>
struct Divisor<float> {
  static constexpr float kMin = 0x1p-60f, kMax = 0x1p60f;
  float value, reciprocal;
  bool usual;

  SNE_MEMBER explicit Divisor(float value) : value(value), reciprocal(divide_exactly(1.0f, value)) {
    usual = value >= kMin && value <= kMax;
  }
  template <int n>
  SNE_MEMBER void divide(float (&values)[n]) const {
    float smallest = kMax, largest = kMin;
    SNE_UNROLL
    for (int i = 0; i < n; ++i) {
      const float size = max_of(values[i], -values[i]);
      smallest = min_of(smallest, size), largest = max_of(largest, size);
    }
    if (usual && smallest >= kMin && largest <= kMax) {
      SNE_UNROLL
      for (int i = 0; i < n; ++i) {
        float quotient = values[i] * reciprocal;
        SNE_UNROLL
        for (int step = 0; step < 2; ++step)
          quotient = multiply_add(multiply_add(-quotient, value, values[i]), reciprocal, quotient);
        values[i] = quotient;
      }
    } else {
      SNE_UNROLL
      for (int i = 0; i < n; ++i) values[i] = divide_exactly(values[i], value);
    }
  }
};

// a / b for 0 <= a < 2^20, 0 < b.
SNE_DEVICE int quotient(int a, float reciprocal) { return int((float(a) + 0.5f) * reciprocal); }

// Loads the 16 bytes that hold values first.. of a run. Values outside of the run are not read, and are 0.
template <class T>
SNE_DEVICE Words load_inside(const T *run, int first, int length) {
  constexpr int vector = kVector<T>;
  if (first >= 0 && first + vector <= length) return load_words(run + first);
  Words out;
  SNE_UNROLL
  for (int i = 0; i < vector; ++i) set_value<T>(out, i, first + i >= 0 && first + i < length ? run[first + i] : T{});
  return out;
}

// Writes 16 bytes of a column into shared memory.
template <class Acc, int vector>
SNE_DEVICE void copy_vector(const Acc (&values)[vector], const Layout &layout, int first, Acc *shared) {
  constexpr int part = kVector<Acc>;
  if (vector >= part && (layout.base + first) % part == 0) {
    SNE_UNROLL
    for (int p = 0; p < vector; p += part) {
      Words words;
      SNE_UNROLL
      for (int v = 0; v < part && p + v < vector; ++v) set_value<Acc>(words, v, values[p + v]);
      store_words(shared + layout.padded(layout.base + first + p), words);
    }
  } else {
    SNE_UNROLL
    for (int v = 0; v < vector; ++v) shared[layout.padded(layout.base + first + v)] = values[v];
  }
}

// Reads the source, divides and writes to shared memory. With `products` returns the sum of the quotients' products
// with `others`, which has the layout of the source and the same offset from a multiple of 16 bytes.
template <class In, class Acc, bool products>
SNE_DEVICE Acc read_tile(const In *from, const In *others, const Divisor<Acc> &divisor, const Shape &s,
                         const Layout &layout, Acc *shared) {
  constexpr int vector = kVector<In>, flight = products ? kInFlight / 2 : kInFlight;
  const int runs = s.whole_rows ? 1 : s.height, length = s.whole_rows ? s.height * s.width : s.width;
  const int per_run = (length + 2 * (vector - 1)) / vector, items = runs * per_run;
  const float per_run_inverse = 1.0f / float(per_run), width_inverse = 1.0f / float(s.width);
  const int64_t origin = s.row * s.columns + s.column;
  Acc total = 0;
  for (int begin = thread_id(); begin < items; begin += flight * kThreads) {
    Words in[flight], other[flight];
    int run[flight], first[flight];
    SNE_UNROLL
    for (int u = 0; u < flight; ++u) {
      const int item = begin + u * kThreads;
      run[u] = runs == 1 ? 0 : quotient(item, per_run_inverse);
      const int64_t at = origin + run[u] * s.columns;
      const int skew = int((uintptr_t(from) / sizeof(In) + uint64_t(at)) & (vector - 1));
      first[u] = item < items ? (item - run[u] * per_run) * vector - skew : length;
      if (first[u] >= length) continue;
      in[u] = load_inside(from + at, first[u], length);
      if constexpr (products) other[u] = load_inside(others + at, first[u], length);
    }
    SNE_UNROLL
    for (int u = 0; u < flight; ++u) {
      if (first[u] >= length) continue;
      Acc values[vector];
      SNE_UNROLL
      for (int v = 0; v < vector; ++v) values[v] = Acc(to_real(value_of<In>(in[u], v)));
      divisor.divide(values);
      if constexpr (products) {  // values outside of the run are 0
        SNE_UNROLL
        for (int v = 0; v < vector; ++v) total += values[v] * Acc(to_real(value_of<In>(other[u], v)));
      }
      if (s.width == 1 && first[u] >= 0 &&
          first[u] + vector <= length) {  // the values are consecutive in shared memory too
        copy_vector(values, layout, first[u], shared);
        continue;
      }
      const int start = first[u] < 0 ? 0 : first[u];
      int i = run[u], j = start;
      if (runs == 1) i = quotient(start, width_inverse), j = start - i * s.width;
      SNE_UNROLL
      for (int v = 0; v < vector; ++v) {
        const int at = first[u] + v;
        if (at < 0 || at >= length) continue;
        shared[layout.index(i, j)] = values[v];
        if (++j == s.width) j = 0, ++i;
      }
    }
  }
  return total;
}

template <class Out, class Acc>
SNE_DEVICE Out cast(Acc value) {
  if constexpr (std::is_same_v<Out, double>) return double(value);
  return from_float<Out>(float(value));  // float64 to a half type is rounded twice, as torch does
}

template <class Out, class Acc>
SNE_DEVICE void write_tile(Out *to, const Shape &s, const Layout &layout, const Acc *shared) {
  constexpr int vector = kVector<Out>, part = kVector<Acc>;
  const int runs = s.whole_columns ? 1 : s.width, length = s.whole_columns ? s.height * s.width : s.height;
  const int per_run = (length + 2 * (vector - 1)) / vector, items = runs * per_run;
  const float per_run_inverse = 1.0f / float(per_run);
  for (int item = thread_id(); item < items; item += kThreads) {
    const int run = runs == 1 ? 0 : quotient(item, per_run_inverse), j = item - run * per_run;
    const int first = j * vector - layout.skew(run);
    if (first >= length) continue;
    const Acc *at = shared + layout.padded(run * layout.pitch + j * vector);
    Out *target = to + (s.column + run) * s.rows + s.row + first;
    if (first >= 0 && first + vector <= length) {
      Words out;
      if constexpr (vector >= part) {
        SNE_UNROLL
        for (int p = 0; p < vector; p += part) {
          const Words words = load_words(at + p);
          SNE_UNROLL
          for (int v = 0; v < part; ++v) set_value<Out>(out, p + v, cast<Out>(value_of<Acc>(words, v)));
        }
      } else {
        SNE_UNROLL
        for (int v = 0; v < vector; ++v) set_value<Out>(out, v, cast<Out>(at[v]));
      }
      store_words(target, out);
    } else {
      for (int v = 0; v < vector; ++v)
        if (first + v >= 0 && first + v < length) target[v] = cast<Out>(at[v]);
    }
  }
}

SNE_DEVICE int log_size_of(int64_t code) {
  return code == SNE_FAST_GATHER_DOUBLE ? 3 : code == SNE_FAST_GATHER_FLOAT ? 2 : 1;
}

// Calls `act` with a value of the type that a code names.
template <class F>
SNE_DEVICE void with_type(int64_t code, F act) {
  if (code == SNE_FAST_GATHER_FLOAT)
    act(float{});
  else if (code == SNE_FAST_GATHER_DOUBLE)
    act(double{});
  else if (code == SNE_FAST_GATHER_HALF)
    act(Half{});
  else
    act(BFloat{});
}

// The tile of a thread block: its tensor, and its place in that matrix or (transposed) in the result.
struct Place {
  int64_t tensor, start;
  Shape shape;

  SNE_MEMBER Place(const Job &job, int64_t tile, bool transposed)
      : tensor(tensor_of_tile(job, tile)), start(job.field(SNE_FAST_GATHER_START, tensor)),
        shape(shape_of(job, tile - job.field(SNE_FAST_GATHER_FIRST_TILE, tensor), tensor, transposed)) {}

  static SNE_MEMBER Shape shape_of(const Job &job, int64_t local, int64_t t, bool transposed) {
    const int64_t rows = job.field(SNE_FAST_GATHER_ROWS, t), columns = job.field(SNE_FAST_GATHER_COLUMNS, t);
    const int64_t height = job.field(SNE_FAST_GATHER_TILE_ROWS, t);
    const int64_t width = job.field(SNE_FAST_GATHER_TILE_COLUMNS, t), across = (columns + width - 1) / width;
    const int64_t row = local / across * height, column = local % across * width;
    return transposed ? Shape(columns, rows, column, row, width, height)
                      : Shape(rows, columns, row, column, height, width);
  }
};

// Writes the transposes of the tensors, divided by their scales.
template <class Acc>
SNE_KERNEL SNE_BOUNDS(kThreads, kBlocks<Acc>) gather(Job job, void *values, int type) {
  const Place place(job, block_id(), false);
  Acc *shared = (Acc *)shared_memory();
  const int log_size = log_size_of(type);
  const Layout layout(place.shape, uintptr_t(values) + (uint64_t(place.start) << log_size), log_size);
  with_type(job.field(SNE_FAST_GATHER_TYPE, place.tensor), [&](auto in) {
    using In = decltype(in);
    const In *from = (const In *)job.address(place.tensor);
    read_tile<In, Acc, false>(from, nullptr, Divisor<Acc>(job.divisor<Acc>(place.tensor)), place.shape, layout, shared);
  });
  sync_block();
  with_type(type, [&](auto out) {
    using Out = decltype(out);
    if constexpr (std::is_same_v<Out, double> == std::is_same_v<Acc, double>)
      write_tile<Out>((Out *)values + place.start, place.shape, layout, shared);
  });
}

// Returns the sum over all threads of the block, in a fixed order, in thread 0.
template <class Acc>
SNE_DEVICE Acc sum_over_block(Acc value, Acc *shared) {
  for (int mask = kWarp / 2; mask; mask >>= 1) value += shuffle_xor(value, mask);
  if (lane_id() == 0) shared[warp_id()] = value;
  sync_block();
  for (int warp = 1; thread_id() == 0 && warp < num_warps(); ++warp) value += shared[warp];
  return value;
}

// Writes the gradients of the tensors and, for each tile, the sum of gradient times value.
template <class Acc>
SNE_KERNEL SNE_BOUNDS(kThreads, kBlocks<Acc>)
    scatter(Job job, const void *grad, const void *values, Acc *parts, int type) {
  const Place place(job, block_id(), true);
  Acc *shared = (Acc *)shared_memory(), total = 0;
  const int64_t code = job.field(SNE_FAST_GATHER_TYPE, place.tensor);
  void *target = job.address(place.tensor);
  const Layout layout(place.shape, uintptr_t(target), log_size_of(code));
  with_type(type, [&](auto in) {
    using In = decltype(in);
    total = read_tile<In, Acc, true>((const In *)grad + place.start, (const In *)values + place.start,
                                     Divisor<Acc>(job.divisor<Acc>(place.tensor)), place.shape, layout, shared);
  });
  sync_block();
  with_type(code, [&](auto out) {
    using Out = decltype(out);
    write_tile<Out>((Out *)target, place.shape, layout, shared);
  });
  sync_block();
  total = sum_over_block(total, shared);
  if (thread_id() == 0) parts[block_id()] = total;
}

// Writes the gradient of each tensor's scale: minus the sum over its tiles, in their order.
template <class Acc>
SNE_KERNEL SNE_BOUNDS(kThreads, kBlocks<Acc>) sum_tiles(Job job, const Acc *parts, Acc *grad_scale, int64_t tiles) {
  const int64_t t = block_id(), end = t + 1 < job.tensors ? job.field(SNE_FAST_GATHER_FIRST_TILE, t + 1) : tiles;
  Acc total = 0;
  for (int64_t tile = job.field(SNE_FAST_GATHER_FIRST_TILE, t) + thread_id(); tile < end; tile += kThreads)
    total += parts[tile];
  total = sum_over_block(total, (Acc *)shared_memory());
  if (thread_id() == 0) grad_scale[job.field(SNE_FAST_GATHER_PLACE, t)] = -total;
}

Job job_of(const sne_fast_cuda_gather *a) {
  return {(const int64_t *)a->table, a->scale, a->wide_scale != 0, a->tensors, a->stride};
}
bool fits(const sne_fast_cuda_gather *a) {
  return a->tensors > 0 && a->stride >= a->tensors && a->tiles > 0 && a->tiles < int64_t(1) << 31 && a->type >= 0 &&
         a->type < 4;
}

template <class Acc>
int run_gather(const sne_fast_cuda_gather *a, Stream stream) {
  return launch(stream, a->tiles, 1, kThreads, kSharedValues * sizeof(Acc), gather<Acc>, job_of(a), a->values,
                int(a->type));
}
template <class Acc>
int run_scatter(const sne_fast_cuda_gather *a, Stream stream) {
  const int status = launch(stream, a->tiles, 1, kThreads, kSharedValues * sizeof(Acc), scatter<Acc>, job_of(a),
                            a->grad, a->values, a->parts, int(a->type));
  if (status) return status;
  return launch(stream, a->tensors, 1, kThreads, kThreads / kWarp * sizeof(Acc), sum_tiles<Acc>, job_of(a), a->parts,
                a->grad_scale, a->tiles);
}

}  // namespace
}  // namespace sne

extern "C" int sne_fast_cuda_gather_chunks(const sne_fast_cuda_gather *a, void *stream) {
  if (!sne::fits(a)) return SNE_FAST_CUDA_BAD_ARGUMENT;
  return a->type == SNE_FAST_GATHER_DOUBLE ? sne::run_gather<double>(a, (sne::Stream)stream)
                                           : sne::run_gather<float>(a, (sne::Stream)stream);
}

extern "C" int sne_fast_cuda_gather_chunks_backward(const sne_fast_cuda_gather *a, void *stream) {
  if (!sne::fits(a)) return SNE_FAST_CUDA_BAD_ARGUMENT;
  return a->wide_scale ? sne::run_scatter<double>(a, (sne::Stream)stream)
                       : sne::run_scatter<float>(a, (sne::Stream)stream);
}
