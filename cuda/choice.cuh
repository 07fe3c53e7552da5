// When a launch begins, and whether it does anything.

// On Hopper and later a launch may be brought up while the one in front runs, if it asks for that: from here on, the
// one behind.
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Waits until all that is in front has ended, and what that has written is there.
__device__ __forceinline__ void wait_for_last() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// CHOSEN: compiled for a launch that is one of several, of which a number in memory chooses; the others return at once.
// Two parameters then come before all others: where the number lies, and which ones choose this launch, a bit each.
#if CHOSEN
#define CHOICE const unsigned *chosen_by, unsigned long long choices,
#define UNLESS_CHOSEN \
    let_next_begin(); \
    wait_for_last();  \
    if (!(choices >> *chosen_by & 1)) return
#else
#define CHOICE
#define UNLESS_CHOSEN
#endif
