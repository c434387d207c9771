// One source for several instruction sets: such a source is compiled with -DSNE_ISA_portable, -DSNE_ISA_avx2,
// -DSNE_ISA_avx512, -DSNE_ISA_avx512_bf16 or -DSNE_ISA_amx_bf16, and puts everything into a namespace of that name. The
// last two hold the kernels whose products take bfloat16 operands, and only those.
//
// It must not instantiate templates or inline functions of the standard library: the linker keeps one copy of those for
// the whole program, which might be the one with AVX-512 instructions. C functions are fine.
#pragma once

#if defined(SNE_ISA_avx512) || defined(SNE_ISA_avx512_bf16) || defined(SNE_ISA_amx_bf16)
#if defined(SNE_ISA_avx512)
#define SNE_ISA avx512
#elif defined(SNE_ISA_avx512_bf16)
#define SNE_ISA avx512_bf16
#define SNE_BF16 1
#else
#define SNE_ISA amx_bf16
#define SNE_BF16 1
#define SNE_AMX 1
#endif
#define SNE_AVX512 1
#define SNE_VECTOR_BYTES 64
#define SNE_VECTORS_PER_PANEL 4  // 32 registers: 6 x 4 sums, 4 columns, 1 broadcast
#elif defined(SNE_ISA_avx2)
#define SNE_ISA avx2
#define SNE_VECTOR_BYTES 32
#define SNE_VECTORS_PER_PANEL 2  // 16 registers: 6 x 2 sums
#elif defined(SNE_ISA_portable)
#define SNE_ISA portable
#define SNE_VECTOR_BYTES 16
#define SNE_VECTORS_PER_PANEL 2
#else
#error "compile with -DSNE_ISA_portable, -DSNE_ISA_avx2, -DSNE_ISA_avx512, -DSNE_ISA_avx512_bf16 or -DSNE_ISA_amx_bf16"
#endif

#define SNE_INLINE inline __attribute__((always_inline))
