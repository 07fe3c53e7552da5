// Codes of a unit in the order of its columns: four lanes exchange what they hold.
//
// Lane q of four holds columns 8·q to 8·q + 7 of 32 (`tiles.cuh`), for two steps of 16: all that one of them needs of
// a row of x lies side by side. Where x comes through shared memory instead, in the order that it has, the matrix unit
// wants columns 2·q, 2·q + 1, 2·q + 8 and 2·q + 9 of each step from lane q. With the 32 columns as four chunks of
// four pairs, chunk i of lane j becomes pair i of chunk j: a transposition, two bits of the lane for two of the slot.
#include "tiles.cuh"

class Exchange {
 public:
  __device__ __forceinline__ explicit Exchange(int lane)
      : odd(lane & 1), high(lane & 2), sent(odd ? 0x6420 : 0x7531), low_word(odd ? 0x3514 : 0x5240),
        high_word(odd ? 0x3716 : 0x7260), byte(odd ? 0x3715 : 0x6240) {}

  __device__ __forceinline__ void operator()(Words<BITS>& unit) const {
    for_planes([&](auto plane) {
      constexpr int p = decltype(plane)::value, width = WIDTHS[p];
      u32* words = unit.word + bits_before(p);
      if constexpr (width == 1) {
        const u32 other = __shfl_xor_sync(~0u, words[0], 1);
        words[0] = __byte_perm(words[0], other, byte);
        swap_fields<1>(words[0]);
      } else if constexpr (width == 2) {
        swap_bytes(words[0], words[1]);
        swap_fields<2>(words[0], words[1]);
      } else {
        // Words of both steps: side by side, or those of the same row.
        constexpr int step = width / 4;
#pragma unroll
        for (int i = 0; i < width; i += 2) {
          u32 &first = words[i / (2 * step) * (2 * step) + i / 2 % step], &second = (&first)[step];
          swap_bytes(first, second);
          swap_words(first, second);
        }
      }
    });
  }

 private:
  const bool odd, high;
  const u32 sent, low_word, high_word, byte;  // selectors of `__byte_perm`

  // The upper bytes of both halves, of both words, for the lower ones of the lane beside.
  __device__ __forceinline__ void swap_bytes(u32& first, u32& second) const {
    const u32 other = __shfl_xor_sync(~0u, __byte_perm(first, second, sent), 1);
    first = __byte_perm(first, other, low_word);
    second = __byte_perm(second, other, high_word);
  }

  // The second word for the first one of the lane two on.
  __device__ __forceinline__ void swap_words(u32& first, u32& second) const {
    const u32 other = __shfl_xor_sync(~0u, high ? first : second, 2);
    if (high) first = other;
    else second = other;
  }

  // The upper of two fields of `width` bits for the lower one, everywhere in two words, or in one.
  template <int width>
  __device__ __forceinline__ void swap_fields(u32& first, u32& second) const {
    constexpr u32 low = width == 1 ? 0x55555555 : 0x33333333;
    const int up = high ? width : 0, down = width - up;
    const u32 other = __shfl_xor_sync(~0u, first >> down & low | second << up & ~low, 2), kept = high ? ~low : low;
    first = first & kept | (other & low) << down;
    second = second & kept | (other & ~low) >> up;
  }

  template <int width>
  __device__ __forceinline__ void swap_fields(u32& word) const {
    constexpr u32 low = width == 1 ? 0x55555555 : 0x33333333;
    const u32 other = __shfl_xor_sync(~0u, word, 2), kept = high ? ~low : low;
    word = word & kept | (high ? other >> width : other << width) & ~kept;
  }
};
