/* Stands in for OpenMP's header where a compiler has none: loops then run in one thread. */
#pragma once
static inline int omp_get_thread_num(void) { return 0; }
