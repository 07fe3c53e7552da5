// Weight-only products, y = x · Wᵀ (+ bias), with 16-bit activations and float32 sums; the codes of W go into the
// matrix unit as exact integers. One instance a translation: STREAM for few rows of x, BLOCK for more.
#if defined(STREAM)
#include "matmul/stream.cuh"
#elif defined(BLOCK)
#include "matmul/block.cuh"
#else
#error "STREAM or BLOCK"
#endif
