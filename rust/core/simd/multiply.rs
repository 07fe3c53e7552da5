//! How unsigned codes meet activations in bytes, four columns at a time.
//!
//! The kernels are written once over [`Multiply`]. Every sum is an exact integer ([`Dot`]), the products of a few
//! words perhaps in 16 bits first, where they always fit.

#![cfg_attr(
    target_arch = "x86_64",
    expect(unsafe_code, reason = "a token proves that the CPU has the instructions")
)]

use std::ops::RangeInclusive;

use super::amx::Amx;
#[cfg(target_arch = "x86_64")]
use super::dot::has_instruction;
use super::dot::{Dot, DotKernel, dispatch_dot};
use super::{Isa, LANES, Token};

/// Words whose products a partial sum takes.
pub(crate) const FEW: usize = 8;

/// An instruction set and its way of multiplying codes with activations in bytes.
pub(crate) trait Multiply: Copy + Send + Sync {
    /// The instruction set.
    type Isa: Isa;
    /// 16 running sums of products.
    type Sum: Copy;
    /// The same of [`FEW`] words at most: narrower where so few leave room.
    type Partial: Copy;
    /// Four columns of codes, as they are multiplied.
    type Codes: Copy;
    /// Bits of the codes that it is chosen for: few rows have kernels of their own for no others.
    const BITS: RangeInclusive<usize> = 1..=8;
    /// What is taken off every code before it is multiplied.
    const OFFSET: i32 = 0;
    /// Whether few rows have a kernel of their own for every number of bits, not only for the common ones: each is
    /// compiled for each instruction set, and takes its time and room.
    const EVERY_STACK: bool = false;
    /// Rows of x up to which codes of less than a byte are better expanded again for every few rows than once, in
    /// memory, for all: measured. With 0 nothing is compiled for it.
    const STREAM_ROWS: usize = 8;
    /// The same for codes of a byte each, which there is nothing to expand of.
    const STREAM_ROWS_OF_BYTES: usize = 1;
    /// Rows of a tile whose sums fit the registers, [`Multiply::TILE_VECTORS`] vectors wide.
    const TILE_ROWS: usize;
    /// Vectors of such a tile: 1 or 4.
    const TILE_VECTORS: usize;
    /// Whether the vectors of a tile are multiplied side by side; or one after the other, unit by unit, because the
    /// registers have room for the sums of one.
    const ABREAST: bool = true;

    /// The token of the instruction set.
    fn isa(self) -> Self::Isa;

    /// The unit that multiplies whole blocks, if the CPU has one for these numbers.
    #[inline(always)]
    fn blocks(self) -> Option<Amx> {
        None
    }

    /// Codes for a product.
    fn codes(self, codes: <Self::Isa as Isa>::U8) -> Self::Codes;
    /// The partial sum that goes on from `sum`: the very same, or zeros.
    fn begin(self, sum: Self::Sum) -> Self::Partial;
    /// Lane `i` of `partial` plus the products of codes 4·i … 4·i + 3 with the four activations of `word`.
    fn multiply(self, partial: Self::Partial, codes: Self::Codes, word: [u8; 4]) -> Self::Partial;
    /// `sum` with the products that `partial` has beyond its beginning.
    fn end(self, sum: Self::Sum, partial: Self::Partial) -> Self::Sum;
    /// Sums from their bits.
    fn load(self, bits: &[u32; LANES]) -> Self::Sum;
    /// The bits of sums.
    fn store(self, bits: &mut [u32; LANES], sum: Self::Sum);
    /// The same sum in every lane, by its bits.
    fn splat(self, bits: u32) -> Self::Sum;
    /// Sums as f32, RNE.
    fn value(self, sum: Self::Sum) -> <Self::Isa as Isa>::F32;

    /// Runs `kernel` with the instructions of this product enabled.
    fn vectorize<K: MultiplyKernel>(self, kernel: K) -> K::Output;
}

/// Like [`Kernel`], for algorithms that need a [`Multiply`].
pub(crate) trait MultiplyKernel {
    /// What it returns.
    type Output;
    /// The algorithm.
    fn run<M: Multiply>(self, by: M) -> Self::Output;
}

/// Bytes: codes and signed activations by dot products in i32.
#[derive(Clone, Copy)]
pub(crate) struct Bytes<D>(D);

impl<D: Dot> Multiply for Bytes<D> {
    type Isa = D::Isa;
    type Sum = <D::Isa as Isa>::I32;
    type Partial = Self::Sum;
    type Codes = <D::Isa as Isa>::U8;
    const OFFSET: i32 = D::OFFSET;
    const EVERY_STACK: bool = D::INSTRUCTION;
    const BITS: RangeInclusive<usize> = D::BITS;
    // From five rows on, blocks in the first-level cache beat another expansion for every four.
    const STREAM_ROWS: usize = match (D::ABREAST, D::TILE_VECTORS) {
        (true, 1) if !D::INSTRUCTION => 0,
        (true, _) => 4,
        (false, _) => 8,
    };
    const STREAM_ROWS_OF_BYTES: usize = if D::ABREAST { 1 } else { 4 };
    const TILE_ROWS: usize = D::TILE_ROWS;
    const TILE_VECTORS: usize = D::TILE_VECTORS;
    const ABREAST: bool = D::ABREAST;

    #[inline(always)]
    fn isa(self) -> D::Isa {
        self.0.isa()
    }

    #[inline(always)]
    fn blocks(self) -> Option<Amx> {
        self.0.blocks()
    }

    #[inline(always)]
    fn codes(self, codes: Self::Codes) -> Self::Codes {
        codes
    }

    #[inline(always)]
    fn begin(self, sum: Self::Sum) -> Self::Sum {
        sum
    }

    #[inline(always)]
    fn multiply(self, sum: Self::Sum, codes: Self::Codes, word: [u8; 4]) -> Self::Sum {
        self.0.dot(sum, codes, i32::from_le_bytes(word))
    }

    #[inline(always)]
    fn end(self, _: Self::Sum, partial: Self::Sum) -> Self::Sum {
        partial
    }

    #[inline(always)]
    fn load(self, bits: &[u32; LANES]) -> Self::Sum {
        self.isa().load_i32(bits)
    }

    #[inline(always)]
    fn store(self, bits: &mut [u32; LANES], sum: Self::Sum) {
        self.isa().store_i32(bits, sum);
    }

    #[inline(always)]
    fn splat(self, bits: u32) -> Self::Sum {
        self.isa().splat_i32(bits.cast_signed())
    }

    #[inline(always)]
    fn value(self, sum: Self::Sum) -> <D::Isa as Isa>::F32 {
        self.isa().to_f32(sum)
    }

    fn vectorize<K: MultiplyKernel>(self, kernel: K) -> K::Output {
        self.0.vectorize(InBytes(kernel))
    }
}

/// A kernel in the hands of a [`Dot`].
struct InBytes<K>(K);

impl<K: MultiplyKernel> DotKernel for InBytes<K> {
    type Output = K::Output;

    #[inline(always)]
    fn run<D: Dot>(self, dot: D) -> K::Output {
        self.0.run(Bytes(dot))
    }
}

/// Runs `kernel` on the instruction set of `token` in bytes, for codes up to `max_code`.
pub(crate) fn dispatch_bytes<K: MultiplyKernel>(token: Token, max_code: u8, kernel: K) -> K::Output {
    #[cfg(target_arch = "x86_64")]
    if let Token::Avx2(isa) = token
        && max_code <= x86::Short::MAX_CODE
        && !has_instruction(token)
    {
        return x86::Short(isa).vectorize(kernel);
    }
    dispatch_dot(token, max_code, InBytes(kernel))
}

/// [`Multiply::OFFSET`] of what [`dispatch_bytes`] chooses.
pub(crate) fn offset(token: Token, max_code: u8) -> i32 {
    struct Asked;

    impl MultiplyKernel for Asked {
        type Output = i32;

        #[inline(always)]
        fn run<M: Multiply>(self, _: M) -> i32 {
            M::OFFSET
        }
    }

    dispatch_bytes(token, max_code, Asked)
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::ops::RangeInclusive;

    use super::super::{Avx2, Isa, Kernel, LANES, VECTORS};
    use super::{FEW, Multiply, MultiplyKernel};

    /// A kernel that already knows how it multiplies, to be run by the instruction set of that.
    struct Within<M, K> {
        by: M,
        kernel: K,
    }

    impl<M: Multiply, K: MultiplyKernel> Kernel for Within<M, K> {
        type Output = K::Output;

        #[inline(always)]
        fn run<I: Isa>(self, _: I) -> K::Output {
            self.kernel.run(self.by)
        }
    }

    /// AVX2 and bytes by `vpmaddubsw`, for codes up to [`Short::MAX_CODE`]: its sums of two products stay 16 bits wide
    /// for [`FEW`] words and only then widen. The ports bound it: two instructions for 32 products, where a dot
    /// product takes three or four.
    #[derive(Clone, Copy)]
    pub(super) struct Short(pub(super) Avx2);

    impl Short {
        /// The largest code whose products with activations up to 127, two of each word, fit an i16.
        pub(super) const MAX_CODE: u8 = (i16::MAX as usize / (2 * 127 * FEW)) as u8;
    }

    impl Multiply for Short {
        type Isa = Avx2;
        type Sum = [__m256i; 2];
        /// 16 lanes of i16, two for each of i32.
        type Partial = [__m256i; 2];
        type Codes = [__m256i; 2];
        const BITS: RangeInclusive<usize> = 1..=4;
        const STREAM_ROWS: usize = 8;
        const TILE_ROWS: usize = 4;
        const TILE_VECTORS: usize = VECTORS;
        const ABREAST: bool = false;

        #[inline(always)]
        fn isa(self) -> Avx2 {
            self.0
        }

        #[inline(always)]
        fn codes(self, codes: [__m256i; 2]) -> [__m256i; 2] {
            codes
        }

        #[inline(always)]
        fn begin(self, _: [__m256i; 2]) -> [__m256i; 2] {
            self.0.splat_i32(0)
        }

        #[inline(always)]
        fn multiply(self, partial: [__m256i; 2], codes: [__m256i; 2], word: [u8; 4]) -> [__m256i; 2] {
            let word = i32::from_le_bytes(word);
            // SAFETY: the token proves AVX2.
            unsafe { [add_pairs(partial[0], codes[0], word), add_pairs(partial[1], codes[1], word)] }
        }

        #[inline(always)]
        fn end(self, sum: [__m256i; 2], partial: [__m256i; 2]) -> [__m256i; 2] {
            // SAFETY: the token proves AVX2.
            self.0.add_i32(sum, unsafe { [widen_pairs(partial[0]), widen_pairs(partial[1])] })
        }

        #[inline(always)]
        fn load(self, bits: &[u32; LANES]) -> [__m256i; 2] {
            self.0.load_i32(bits)
        }

        #[inline(always)]
        fn store(self, bits: &mut [u32; LANES], sum: [__m256i; 2]) {
            self.0.store_i32(bits, sum);
        }

        #[inline(always)]
        fn splat(self, bits: u32) -> [__m256i; 2] {
            self.0.splat_i32(bits.cast_signed())
        }

        #[inline(always)]
        fn value(self, sum: [__m256i; 2]) -> [__m256; 2] {
            self.0.to_f32(sum)
        }

        fn vectorize<K: MultiplyKernel>(self, kernel: K) -> K::Output {
            self.0.vectorize(Within { by: self, kernel })
        }
    }

    /// 16 lanes of i16 plus the sums of two products each of unsigned codes with the four signed bytes of `word`.
    ///
    /// # Safety
    ///
    /// The CPU must have AVX2.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn add_pairs(sums: __m256i, codes: __m256i, word: i32) -> __m256i {
        _mm256_add_epi16(sums, _mm256_maddubs_epi16(codes, _mm256_set1_epi32(word)))
    }

    /// The sums of lanes 2·i and 2·i + 1 of i16.
    ///
    /// # Safety
    ///
    /// The CPU must have AVX2.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn widen_pairs(sums: __m256i) -> __m256i {
        _mm256_madd_epi16(sums, _mm256_set1_epi16(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::TILE;

    /// Products of the largest codes with the largest activations, word after word, as the kernels take them.
    struct Largest {
        max_code: u8,
        word: [i8; 4],
        words: usize,
    }

    impl MultiplyKernel for Largest {
        type Output = [u32; LANES];

        #[inline(always)]
        fn run<M: Multiply>(self, by: M) -> [u32; LANES] {
            let isa = by.isa();
            let word = self.word.map(|x| x as u8);
            let codes = by.codes(isa.load_u8(&[self.max_code; TILE]));
            // What is taken off the codes, for all words at once.
            let taken = M::OFFSET * self.word.iter().map(|x| i32::from(*x)).sum::<i32>() * self.words as i32;
            let mut sum = by.splat((7 + taken).cast_unsigned());
            let mut done = 0;
            while done < self.words {
                let few = (self.words - done).min(FEW);
                let mut partial = by.begin(sum);
                for _ in 0..few {
                    partial = by.multiply(partial, codes, word);
                }
                sum = by.end(sum, partial);
                done += few;
            }
            let mut bits = [0; LANES];
            by.store(&mut bits, sum);
            bits
        }
    }

    #[test]
    fn sums_of_the_largest_products_are_exact_however_many() {
        const SIGNS: [[i8; 4]; 4] = [[127; 4], [-127; 4], [127, -127, -127, 127], [-127, -127, 127, 0]];
        for max_code in [1, 3, 7, 15, 16, 17, 31, 63, 127, 128, 129, 130, 255] {
            for (word, words) in SIGNS.into_iter().flat_map(|word| [1, 2, 7, 8, 9, 16, 33].map(|n| (word, n)))
            {
                let of_a_word: i32 = word.iter().map(|x| i32::from(*x) * i32::from(max_code)).sum();
                let expected = [(7 + of_a_word * words as i32).cast_unsigned(); LANES];
                for token in Token::available() {
                    let got = dispatch_bytes(token, max_code, Largest { max_code, word, words });
                    assert_eq!(
                        got,
                        expected,
                        "{}: {words} words {word:?} with codes {max_code}",
                        token.name()
                    );
                }
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn sums_of_16_bits_have_room_for_the_largest_codes_and_for_no_larger() {
        let Some(isa) = crate::simd::Avx2::detect() else { return };
        let sums = |max_code: u8, x: i8| {
            let kernel = Largest { max_code, word: [x; 4], words: FEW };
            x86::Short(isa).vectorize(kernel).map(u32::cast_signed)
        };
        let exact = |max_code: u8, x: i32| [7 + FEW as i32 * 4 * x * i32::from(max_code); LANES];
        for x in [127, -127] {
            for max_code in 1..=x86::Short::MAX_CODE {
                assert_eq!(sums(max_code, x), exact(max_code, i32::from(x)), "{max_code}");
            }
            let larger = x86::Short::MAX_CODE + 1;
            assert_ne!(sums(larger, x), exact(larger, i32::from(x)), "{larger}");
        }
    }
}
