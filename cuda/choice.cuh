// A launch that is one of several, of which a number in memory chooses: the others return at once.
//
// CHOSEN: compiled for that. Two parameters then come before all others: where the number lies, and which ones
// choose this launch, a bit each.
#if CHOSEN
#define CHOICE const unsigned *chosen_by, unsigned long long choices,
#define UNLESS_CHOSEN \
    if (!(choices >> *chosen_by & 1)) return
#else
#define CHOICE
#define UNLESS_CHOSEN
#endif
