// A launch that is one of several, of which a number in memory chooses: the others return at once.
//
// CHOSEN: compiled for that. Two parameters then come before all others: where the number lies, and which ones
// choose this launch, a bit each. On Hopper and later, the launch behind is brought up meanwhile, if it asks for that;
// each waits here until the one in front has ended and what that has written is there.
#if CHOSEN
#define CHOICE const unsigned *chosen_by, unsigned long long choices,
#if __CUDA_ARCH__ >= 900
#define IN_TURN asm volatile("griddepcontrol.launch_dependents;\ngriddepcontrol.wait;" ::: "memory")
#else
#define IN_TURN
#endif
#define UNLESS_CHOSEN \
    IN_TURN;          \
    if (!(choices >> *chosen_by & 1)) return
#else
#define CHOICE
#define UNLESS_CHOSEN
#endif
