// Calls the exported functions of the CPU library with sizes, pointers and values taken from bytes, and checks what
// they promise: what does not fit together is refused and nothing is written; else all results are written, NaN stays
// NaN and stays where it came in. The sanitizers watch every access.
//
//   python csrc/fuzz/run.py
//
// Bytes, in order: op (0 to 5: chunk_encode, set_attention, segment_pool, gather_chunks, tensor_statistics, set_block),
// dtype (even float, odd double; from 128 on even ones are bfloat16 where op and processor have its products),
// instruction set, width, heads, flags (1: layer norm, 2: raw pointers), then what each op reads below. Missing bytes
// are 0.
#include <math.h>
#include <stdint.h>

#include <memory>
#include <vector>

#include "fuzz/inputs.h"
#include "sne_fast/cpu_abi.h"
#include "tests/bfloat16.h"

using namespace fuzz;

namespace {

template <class T>
void chunk_encode(Bytes &bytes, int dtype, const Shape &shape, bool norms, bool raw) {
  const int64_t h = shape.known ? shape.h : 32, H = shape.known ? shape.heads : 1;
  const uint32_t seed = bytes.next();
  const int64_t tensors = bytes.below(5), element_rows = bytes.below(70), threads = bytes.next();
  Pointers owners(bytes, tensors, 9, raw && bytes.below(2));
  const int64_t chunks = owners.rows;
  Pointers chunk(bytes, chunks, 70, raw);
  int64_t longest = 0;
  if (chunk.good)
    for (int64_t t = 0; t < chunks; ++t)
      longest = longest > chunk.ptr[t + 1] - chunk.ptr[t] ? longest : chunk.ptr[t + 1] - chunk.ptr[t];
  const bool good = shape.known && owners.good && chunk.good && longest <= element_rows;
  Array<T> x = values<T>(bytes, chunk.rows), row_code = drawn<T>(seed, tensors * h, 1),
           element_code = drawn<T>(seed + 1, element_rows * h, 1), logit = drawn<T>(seed + 2, 2 * H, 1),
           basis = drawn<T>(seed + 3, 3 * h, 1), w_qkv = drawn<T>(seed + 4, 9 * h * h, .2),
           b_qkv = drawn<T>(seed + 5, 9 * h, .1), w_o = drawn<T>(seed + 6, 4 * h * h, .2),
           b_o = drawn<T>(seed + 7, 4 * h, .1), norm = drawn<T>(seed + 8, norms ? 16 * h : 0, .2, 1),
           pool_query = drawn<T>(seed + 9, H * h, .3);
  const sne_fast_chunk_encode_args args = {chunks,
                                           tensors,
                                           chunk.rows,
                                           shape.h,
                                           shape.heads,
                                           element_rows,
                                           norms,
                                           threads,
                                           chunk.ptr.data(),
                                           owners.ptr.data(),
                                           x.data(),
                                           row_code.data(),
                                           element_code.data(),
                                           logit.data(),
                                           basis.data(),
                                           w_qkv.data(),
                                           b_qkv.data(),
                                           w_o.data(),
                                           b_o.data(),
                                           norm.data(),
                                           pool_query.data()};
  Array<T> out = unwritten<T>(chunks * H * h);
  int status = sne_fast_cpu_chunk_encode(dtype, &args, out.data());
  const bool done = judge(status, good, written(out), "status of chunk_encode");
  Array<T> grad = drawn<T>(seed + 10, chunks * H * h, 1);
  Array<T> *inputs[] = {&x, &row_code, &element_code, &logit, &basis, &w_qkv, &b_qkv, &w_o, &b_o, &norm, &pool_query};
  std::vector<Array<T>> grads;
  for (Array<T> *input : inputs) grads.push_back(unwritten<T>(input->size()));
  sne_fast_chunk_encode_grads to = {grad.data(),     grads[0].data(), grads[1].data(), grads[2].data(),
                                    grads[3].data(), grads[4].data(), grads[5].data(), grads[6].data(),
                                    grads[7].data(), grads[8].data(), grads[9].data(), grads[10].data()};
  status = sne_fast_cpu_chunk_encode_backward(dtype, &args, &to);
  int64_t total = 0, all = 0;
  for (Array<T> &g : grads) total += written(g), all += g.size();
  judge(status, good, total, "status of chunk_encode_backward");
  if (!done) return;
  require(written(out) == out.size() && total == all, "chunk_encode writes all results");
  for (int64_t t = 0; t < chunks; ++t) {
    bool has_nan = false, all_moderate = true;
    for (int64_t i = chunk.ptr[t]; i < chunk.ptr[t + 1]; ++i) {
      has_nan = has_nan || isnan(x[i]);
      all_moderate = all_moderate && moderate(x[i]);
    }
    for (int64_t i = t * H * h; i < (t + 1) * H * h; ++i) {
      if (has_nan) require(isnan(out[i]), "chunk_encode keeps NaN");
      if (all_moderate) require(isfinite(out[i]), "chunk_encode keeps chunks apart");
    }
    for (int64_t i = chunk.ptr[t]; i < chunk.ptr[t + 1] && all_moderate; ++i)
      require(isfinite(grads[0][i]), "chunk_encode_backward keeps chunks apart");
  }
}

template <class T>
void set_attention(Bytes &bytes, int dtype, const Shape &shape, bool raw) {
  const int64_t h = shape.known ? shape.h : 32, H = shape.known ? shape.heads : 1, d = h / H;
  const int64_t sets = bytes.below(6), threads = bytes.next();
  Pointers queries(bytes, sets, 90, raw && bytes.below(2)), keys(bytes, sets, 90, raw);
  const bool good = shape.known && queries.good && keys.good;
  const uint32_t seed = bytes.next();
  Array<T> q = drawn<T>(seed, queries.rows * h, 2), k = drawn<T>(seed + 1, keys.rows * h, 2),
           v = drawn<T>(seed + 2, keys.rows * h, 1), grad = drawn<T>(seed + 3, queries.rows * h, 1);
  for (int64_t n = bytes.below(4); n > 0; --n) {
    Array<T> *where[] = {&q, &k, &v};
    Array<T> &array = *where[bytes.below(3)];
    const int64_t at = bytes.next() * 256 + bytes.next();
    if (array.size()) array[at % array.size()] = value_of<T>(bytes.next());
  }
  Array<T> out = unwritten<T>(queries.rows * h);
  auto lse = unwritten<typename SumOf<T>::type>(queries.rows * H);
  const sne_fast_set_attention_args args = {sets,     queries.rows,       keys.rows,       shape.h,  shape.heads,
                                            threads,  queries.ptr.data(), keys.ptr.data(), q.data(), k.data(),
                                            v.data(), out.data(),         lse.data()};
  int status = sne_fast_cpu_set_attention(dtype, &args);
  const bool done = judge(status, good, written(out) + written(lse), "status of set_attention");
  Array<T> gq = unwritten<T>(q.size()), gk = unwritten<T>(k.size()), gv = unwritten<T>(v.size());
  const sne_fast_set_attention_grads to = {grad.data(), gq.data(), gk.data(), gv.data()};
  status = sne_fast_cpu_set_attention_backward(dtype, &args, &to);
  const int64_t total = written(gq) + written(gk) + written(gv);
  judge(status, good, total, "status of set_attention_backward");
  if (!done) return;
  require(written(out) == out.size() && written(lse) == lse.size(), "set_attention writes all results");
  require(total == q.size() + k.size() + v.size(), "set_attention_backward writes all results");
  for (int64_t s = 0; s < sets; ++s)
    for (int64_t head = 0; head < H; ++head) {
      bool has_nan = false, all_moderate = true;  // of keys; of all
      auto look = [&](Array<T> &array, Pointers &p, bool is_key) {
        for (int64_t r = p.ptr[s]; r < p.ptr[s + 1]; ++r)
          for (int64_t f = r * h + head * d; f < r * h + (head + 1) * d; ++f) {
            has_nan = has_nan || (is_key && isnan(array[f]));
            all_moderate = all_moderate && moderate(array[f]);
          }
      };
      look(q, queries, false), look(k, keys, true), look(v, keys, false);
      for (int64_t r = queries.ptr[s]; r < queries.ptr[s + 1]; ++r)
        for (int64_t f = r * h + head * d; f < r * h + (head + 1) * d; ++f) {
          if (has_nan) require(isnan(out[f]) && isnan(gq[f]), "set_attention keeps NaN");
          if (all_moderate) require(isfinite(out[f]) && isfinite(gq[f]), "set_attention keeps sets and heads apart");
        }
    }
}

template <class T>
void set_block(Bytes &bytes, int dtype, const Shape &shape, bool norms, bool raw) {
  constexpr int64_t dims[] = {16, 32, 48, 64, 8, 0, -16, 1040, int64_t(1) << 60, INT64_MIN};
  const int64_t dim_q = dims[bytes.below(10)], dim_k = dims[bytes.below(10)];
  const bool known = shape.known && dim_q > 8 && dim_k > 8 && dim_q <= 64 && dim_k <= 64;
  const int64_t h = known ? shape.h : 32, n_q = known ? dim_q : 16, n_k = known ? dim_k : 16;
  const int64_t sets = bytes.below(6), threads = bytes.next();
  Pointers queries(bytes, sets, 90, raw && bytes.below(2)), keys(bytes, sets, 90, raw);
  const bool good = known && queries.good && keys.good;
  const uint32_t seed = bytes.next();
  Array<T> q = drawn<T>(seed, queries.rows * n_q, 1), k = drawn<T>(seed + 1, keys.rows * n_k, 1),
           w_q = drawn<T>(seed + 2, h * n_q, .2), b_q = drawn<T>(seed + 3, h, .1),
           w_k = drawn<T>(seed + 4, h * n_k, .2), b_k = drawn<T>(seed + 5, h, .1),
           w_v = drawn<T>(seed + 6, h * n_k, .2), b_v = drawn<T>(seed + 7, h, .1), w_o = drawn<T>(seed + 8, h * h, .2),
           b_o = drawn<T>(seed + 9, h, .1), norm = drawn<T>(seed + 10, norms ? 4 * h : 0, 1),
           grad = drawn<T>(seed + 11, queries.rows * h, 1);
  for (int64_t n = bytes.below(4); n > 0; --n) {
    Array<T> &array = bytes.below(2) ? q : k;
    const int64_t at = bytes.next() * 256 + bytes.next();
    if (array.size()) array[at % array.size()] = value_of<T>(bytes.next());
  }
  Array<T> out = unwritten<T>(queries.rows * h);
  const sne_fast_set_block_args args = {
      sets,       queries.rows,       keys.rows,       dim_q,      dim_k,      shape.h,     shape.heads, norms,
      threads,    queries.ptr.data(), keys.ptr.data(), q.data(),   k.data(),   w_q.data(),  b_q.data(),  w_k.data(),
      b_k.data(), w_v.data(),         b_v.data(),      w_o.data(), b_o.data(), norm.data(), out.data()};
  int status = sne_fast_cpu_set_block(dtype, &args);
  const bool done = judge(status, good, written(out), "status of set_block");
  Array<T> *inputs[] = {&q, &k, &w_q, &b_q, &w_k, &b_k, &w_v, &b_v, &w_o, &b_o, &norm};
  std::vector<Array<T>> grads;
  for (Array<T> *input : inputs) grads.push_back(unwritten<T>(input->size()));
  const sne_fast_set_block_grads to = {grad.data(),     grads[0].data(), grads[1].data(), grads[2].data(),
                                       grads[3].data(), grads[4].data(), grads[5].data(), grads[6].data(),
                                       grads[7].data(), grads[8].data(), grads[9].data(), grads[10].data()};
  status = sne_fast_cpu_set_block_backward(dtype, &args, &to);
  int64_t total = 0, all = 0;
  for (Array<T> &g : grads) total += written(g), all += g.size();
  judge(status, good, total, "status of set_block_backward");
  if (!done) return;
  require(written(out) == out.size() && total == all, "set_block writes all results");
  for (int64_t s = 0; s < sets; ++s) {
    bool all_moderate = true;
    auto look = [&](Array<T> &array, Pointers &p, int64_t dim) {
      for (int64_t i = p.ptr[s] * dim; i < p.ptr[s + 1] * dim; ++i) all_moderate = all_moderate && moderate(array[i]);
    };
    look(q, queries, n_q), look(k, keys, n_k);
    for (int64_t r = queries.ptr[s]; r < queries.ptr[s + 1]; ++r) {
      bool has_nan = false;
      for (int64_t f = r * n_q; f < (r + 1) * n_q; ++f) has_nan = has_nan || isnan(q[f]);
      for (int64_t f = r * h; f < (r + 1) * h; ++f) {
        if (has_nan) require(isnan(out[f]), "set_block keeps NaN");
        if (all_moderate) require(isfinite(out[f]), "set_block keeps sets apart");
      }
      for (int64_t f = r * n_q; f < (r + 1) * n_q; ++f)
        if (all_moderate) require(isfinite(grads[0][f]), "set_block_backward keeps sets apart");
    }
  }
}

template <class T>
void segment_pool(Bytes &bytes, int dtype, const Shape &shape, bool raw) {
  const int64_t unit = dtype == SNE_FAST_BF16 ? 32 : 16;
  const bool known = shape.h >= unit && shape.h % unit == 0 && shape.heads >= 1;
  const int64_t h = known ? shape.h : unit, A = known ? shape.heads : 1;
  const int64_t segments = bytes.below(6), threads = bytes.next();
  Pointers pieces(bytes, segments, 200, raw);
  const bool good = known && pieces.good;
  const uint32_t seed = bytes.next();
  Array<T> x = drawn<T>(seed, pieces.rows * h, 1), logits = values<T>(bytes, pieces.rows * A),
           grad = drawn<T>(seed + 1, segments * A * h, 1);
  Array<T> out = unwritten<T>(segments * A * h);
  auto lse = unwritten<typename SumOf<T>::type>(segments * A);
  const sne_fast_segment_pool_args args = {segments,          pieces.rows, shape.h,       shape.heads, threads,
                                           pieces.ptr.data(), x.data(),    logits.data(), out.data(),  lse.data()};
  int status = sne_fast_cpu_segment_pool(dtype, &args);
  const bool done = judge(status, good, written(out) + written(lse), "status of segment_pool");
  Array<T> gx = unwritten<T>(x.size()), gl = unwritten<T>(logits.size());
  const sne_fast_segment_pool_grads to = {grad.data(), gx.data(), gl.data()};
  status = sne_fast_cpu_segment_pool_backward(dtype, &args, &to);
  judge(status, good, written(gx) + written(gl), "status of segment_pool_backward");
  if (!done) return;
  require(written(out) == out.size() && written(lse) == lse.size(), "segment_pool writes all results");
  require(written(gx) == gx.size() && written(gl) == gl.size(), "segment_pool_backward writes all results");
  for (int64_t s = 0; s < segments; ++s)
    for (int64_t a = 0; a < A; ++a) {
      bool has_nan = false, all_finite = true;
      for (int64_t r = pieces.ptr[s]; r < pieces.ptr[s + 1]; ++r) {
        has_nan = has_nan || isnan(logits[r * A + a]);
        all_finite = all_finite && isfinite(logits[r * A + a]);
      }
      for (int64_t f = (s * A + a) * h; f < (s * A + a + 1) * h; ++f) {
        if (has_nan) require(isnan(out[f]), "segment_pool keeps NaN");
        if (all_finite) require(isfinite(out[f]), "segment_pool keeps segments and heads apart");
      }
      for (int64_t r = pieces.ptr[s]; r < pieces.ptr[s + 1]; ++r) {
        if (has_nan) require(isnan(gl[r * A + a]), "segment_pool_backward keeps NaN");
        if (all_finite) require(isfinite(gl[r * A + a]), "segment_pool_backward keeps segments and heads apart");
      }
    }
}

template <class T>
void gather_chunks(Bytes &bytes, int dtype, bool raw) {
  const int64_t matrices = bytes.below(6), threads = bytes.next();
  Array<int64_t> shapes(2 * matrices);
  int64_t total = 0;
  for (int64_t t = 0; t < matrices; ++t) {
    shapes[2 * t] = bytes.below(80);
    shapes[2 * t + 1] = bytes.below(80);
    total += shapes[2 * t] * shapes[2 * t + 1];
  }
  if (raw && matrices) {
    constexpr int64_t hostile[] = {0, int64_t(1) << 62, -1, INT64_MAX, INT64_MIN, int64_t(1) << 32, 3, 1};
    for (int64_t k = bytes.below(3) + 1; k > 0; --k) shapes[bytes.below(2 * matrices)] = hostile[bytes.below(8)];
  }
  bool good = true;
  int64_t sum = 0;
  for (int64_t t = 0; t < matrices && good; ++t) {
    const int64_t R = shapes[2 * t], K = shapes[2 * t + 1];
    int64_t size = 0;
    good = R >= 0 && K >= 0 && !__builtin_mul_overflow(R, K, &size) && !__builtin_add_overflow(sum, size, &sum) &&
           sum <= total;
  }
  good = good && sum == total;
  Array<int32_t> dtypes(matrices);
  Array<double> scale(matrices), scale_grad = unwritten<double>(matrices);
  Array<void *> where(matrices);
  std::vector<std::unique_ptr<uint8_t[]>> blocks;
  bool real = true;
  for (int64_t t = 0; t < matrices; ++t) {
    constexpr int64_t bytes_of[] = {4, 8, 2, 2};
    dtypes[t] = int32_t(bytes.below(4));
    real = real && dtypes[t] < 2;
    scale[t] = 1 + bytes.below(3);
    const int64_t size = good ? shapes[2 * t] * shapes[2 * t + 1] * bytes_of[dtypes[t]] : 0;
    blocks.emplace_back(new uint8_t[size_t(size)]());
    where[t] = blocks.back().get();
  }
  Array<T> to = unwritten<T>(total), grad = drawn<T>(3, total, 1);
  const sne_fast_gather_chunks_args args = {matrices,     total,        threads,   shapes.data(), dtypes.data(),
                                            where.data(), scale.data(), to.data(), grad.data(),   scale_grad.data()};
  judge(sne_fast_cpu_gather_chunks(dtype, &args), good, written(to), "status of gather_chunks");
  if (good) require(written(to) == total, "gather_chunks writes all values");
  if (good && !real) return;  // gradients are in float or double
  judge(sne_fast_cpu_gather_chunks_backward(dtype, &args), good, written(scale_grad), "status of its backward");
  if (good) require(written(scale_grad) == matrices, "gather_chunks_backward writes all gradients");
}

template <class T>
void tensor_statistics(Bytes &bytes, int dtype, bool raw) {
  const int64_t tensors = bytes.below(6), threads = bytes.next();
  Array<int64_t> start(tensors + 1), dims(6 * tensors);
  start[0] = 0;
  for (int64_t t = 0; t < tensors; ++t) {
    int64_t *d = dims.data() + 6 * t;
    d[0] = 1 + bytes.below(90);
    d[1] = bytes.below(90);
    d[2] = d[1] ? 1 + bytes.below(9) : 1;
    d[3] = 1 + bytes.below(90), d[4] = 1 + bytes.below(90), d[5] = bytes.below(2);
    start[t + 1] = start[t] + d[0] * (d[1] ? d[1] : 1) * d[2];
  }
  const int64_t total = start[tensors];
  bool good = true;
  if (raw && tensors) {
    constexpr int64_t hostile[] = {0, int64_t(1) << 62, -1, INT64_MAX, INT64_MIN, int64_t(1) << 32, 3, 1};
    for (int64_t k = bytes.below(3) + 1; k > 0; --k) {
      const int64_t value = hostile[bytes.below(8)];
      if (bytes.below(2))
        dims[bytes.below(6 * tensors)] = value;
      else
        start[bytes.below(tensors + 1)] = value;
    }
    good = start[0] == 0 && start[tensors] == total;
    for (int64_t t = 0; t < tensors && good; ++t) {
      const int64_t *d = dims.data() + 6 * t;
      int64_t size = 0;
      good = start[t] < start[t + 1] && start[t + 1] <= total && d[0] > 0 && d[1] >= 0 && d[2] > 0 && d[3] > 0 &&
             d[4] > 0 && (d[5] == 0 || d[5] == 1) && (d[1] > 0 || d[2] == 1) &&
             !__builtin_mul_overflow(d[0], d[1] ? d[1] : 1, &size) && !__builtin_mul_overflow(size, d[2], &size) &&
             size == start[t + 1] - start[t];
    }
  }
  const bool draw = bytes.below(2);
  Array<T> x = draw ? drawn<T>(bytes.next(), total, 1) : values<T>(bytes, total);
  Array<double> scale(tensors);
  for (int64_t t = 0; t < tensors; ++t) scale[t] = 1 + bytes.below(3);
  Array<T> out = unwritten<T>(SNE_FAST_STATISTICS * tensors);
  const sne_fast_tensor_statistics_args args = {tensors,     total,        threads,  start.data(),
                                                dims.data(), scale.data(), x.data(), out.data()};
  const int status = sne_fast_cpu_tensor_statistics(dtype, &args);
  if (!judge(status, good, written(out), "status of tensor_statistics")) return;
  require(written(out) == out.size(), "tensor_statistics writes all results");
  for (int64_t t = 0; t < tensors; ++t) {
    bool all_moderate = true, some_nan = false;
    for (int64_t i = start[t]; i < start[t + 1]; ++i) {
      all_moderate = all_moderate && moderate(x[i]);
      some_nan = some_nan || !isfinite(x[i]);
    }
    for (int64_t c = SNE_FAST_STATISTICS * t; c < SNE_FAST_STATISTICS * (t + 1); ++c) {
      if (some_nan) require(isnan(out[c]), "tensor_statistics is NaN where a value is not finite");
      if (all_moderate) require(isfinite(out[c]), "tensor_statistics keeps tensors apart");
    }
  }
}

template <class T>
void call(Bytes &bytes, int64_t op, int dtype) {
  const Shape shape(bytes);
  const uint8_t flags = bytes.next();
  const bool norms = flags & 1, raw = flags & 2;
  switch (op) {
    case 0: return chunk_encode<T>(bytes, dtype, shape, norms, raw);
    case 1: return set_attention<T>(bytes, dtype, shape, raw);
    case 2: return segment_pool<T>(bytes, dtype, shape, raw);
    case 3: return gather_chunks<T>(bytes, dtype, raw);
    case 4: return tensor_statistics<T>(bytes, dtype, raw);
    default: return set_block<T>(bytes, dtype, shape, norms, raw);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  Bytes bytes(data, size);
  const int64_t op = bytes.below(6), kind = bytes.next();
  const char *isas[] = {"avx512", "avx2", "portable"};
  const char *isa = isas[bytes.below(3)];
  sne_fast_cpu_select_isa(sne_fast_cpu_has_isa(isa) ? isa : "");
  const char *bf16 = kind < 192 ? "avx512_bf16" : "amx_bf16";
  if (kind % 2) {
    call<double>(bytes, op, SNE_FAST_F64);
    return 0;
  }
  const bool multiplies = kind >= 128 && sne_fast_cpu_select_isa(bf16) == SNE_FAST_OK;
  if (multiplies && (op == 0 || op == 5))
    call<float>(bytes, op, SNE_FAST_BF16);
  else if (multiplies && (op == 1 || op == 2))
    call<Bfloat16>(bytes, op, SNE_FAST_BF16);
  else
    call<float>(bytes, op, SNE_FAST_F32);
  return 0;
}
