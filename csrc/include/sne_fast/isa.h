// One source for three instruction sets: such a source is compiled with -DSNE_ISA_portable, -DSNE_ISA_avx2 or
// -DSNE_ISA_avx512, and puts everything into a namespace of that name.
//
// It must not instantiate templates or inline functions of the standard library: the linker keeps one copy of those for
// the whole program, which might be the one with AVX-512 instructions. C functions are fine.
#pragma once

#if defined(SNE_ISA_avx512)
#define SNE_ISA avx512
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
#error "compile with -DSNE_ISA_portable, -DSNE_ISA_avx2 or -DSNE_ISA_avx512"
#endif

#define SNE_INLINE inline __attribute__((always_inline))
