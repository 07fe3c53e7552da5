//! How unsigned codes meet activations, four columns at a time: in bytes, in f32 or in bfloat16.
//!
//! The matmul kernels are written once over [`Multiply`]. In bytes every sum is an exact integer ([`Dot`]). In
//! floats a code is exact too, in eight bits of significand, and the four products of a word are added one after
//! the other, columns 2, 0, 3, 1: the order in which `vdpbf16ps` takes two pairs. With fused multiply-adds in that
//! order f32 gives the same bits as bfloat16 does, for activations that bfloat16 holds.

#![cfg_attr(
    target_arch = "x86_64",
    expect(unsafe_code, reason = "a token proves that the CPU has the instructions")
)]

use super::amx::Amx;
use super::dot::{Dot, DotKernel, dispatch_dot};
use super::{Isa, Kernel, LANES, Token};

/// An instruction set and its way of multiplying codes with activations.
pub(crate) trait Multiply: Copy + Send + Sync {
    /// The instruction set.
    type Isa: Isa;
    /// 16 running sums of products.
    type Sum: Copy;
    /// Four columns of codes, as they are multiplied.
    type Codes: Copy;
    /// Four activations, as they lie in memory.
    type Word: Copy;
    /// Most bits of a code that it takes.
    const MAX_BITS: u32 = 8;
    /// Whether few rows have a kernel of their own for every number of bits, not only for the common ones: each is
    /// compiled for each instruction set, and takes its time and room.
    const EVERY_STACK: bool = false;
    /// Rows of x up to which codes of less than a byte are better expanded again for every few rows than once, in
    /// memory, for all: measured.
    const STREAM_ROWS: usize = 8;
    /// Rows of a tile whose sums fit the registers, [`Multiply::TILE_VECTORS`] vectors wide.
    const TILE_ROWS: usize;
    /// Vectors of such a tile: 1 or 4.
    const TILE_VECTORS: usize;

    /// The token of the instruction set.
    fn isa(self) -> Self::Isa;

    /// The unit that multiplies whole blocks, if the CPU has one for these numbers.
    #[inline(always)]
    fn blocks(self) -> Option<Amx> {
        None
    }

    /// Words, from their bytes.
    fn words(bytes: &[u8]) -> &[Self::Word];
    /// Codes for a product.
    fn codes(self, codes: <Self::Isa as Isa>::U8) -> Self::Codes;
    /// Lane `i` of `sum` plus the products of codes 4·i … 4·i + 3 with the four activations of `word`.
    fn multiply(self, sum: Self::Sum, codes: Self::Codes, word: Self::Word) -> Self::Sum;
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

/// Bytes: codes and signed activations by dot products in i32.
#[derive(Clone, Copy)]
pub(crate) struct Bytes<D>(D);

impl<D: Dot> Multiply for Bytes<D> {
    type Isa = D::Isa;
    type Sum = <D::Isa as Isa>::I32;
    type Codes = <D::Isa as Isa>::U8;
    type Word = [u8; 4];
    const EVERY_STACK: bool = D::INSTRUCTION;
    const STREAM_ROWS: usize = 16;
    const TILE_ROWS: usize = D::TILE_ROWS;
    const TILE_VECTORS: usize = D::TILE_VECTORS;

    #[inline(always)]
    fn isa(self) -> D::Isa {
        self.0.isa()
    }

    #[inline(always)]
    fn blocks(self) -> Option<Amx> {
        self.0.blocks()
    }

    #[inline(always)]
    fn words(bytes: &[u8]) -> &[[u8; 4]] {
        bytes.as_chunks().0
    }

    #[inline(always)]
    fn codes(self, codes: Self::Codes) -> Self::Codes {
        codes
    }

    #[inline(always)]
    fn multiply(self, sum: Self::Sum, codes: Self::Codes, word: [u8; 4]) -> Self::Sum {
        self.0.dot(sum, codes, i32::from_le_bytes(word))
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

/// f32 by fused multiply-adds.
#[derive(Clone, Copy)]
pub(crate) struct Floats<I>(I);

impl<I: Isa> Multiply for Floats<I> {
    type Isa = I;
    type Sum = I::F32;
    type Codes = [I::F32; 4];
    type Word = [u8; 16];
    // In wide tiles a row less: the codes of a word take four registers.
    const TILE_ROWS: usize = if I::TILE_VECTORS == 1 { I::TILE_ROWS } else { I::TILE_ROWS - 1 };
    const TILE_VECTORS: usize = I::TILE_VECTORS;

    #[inline(always)]
    fn isa(self) -> I {
        self.0
    }

    #[inline(always)]
    fn words(bytes: &[u8]) -> &[[u8; 16]] {
        bytes.as_chunks().0
    }

    #[inline(always)]
    fn codes(self, codes: I::U8) -> [I::F32; 4] {
        let (isa, words) = (self.0, self.0.words(codes));
        let byte = |word| isa.to_f32(isa.and(word, isa.splat_i32(255)));
        [byte(words), byte(isa.shr::<8>(words)), byte(isa.shr::<16>(words)), isa.to_f32(isa.shr::<24>(words))]
    }

    #[inline(always)]
    fn multiply(self, mut sum: I::F32, codes: [I::F32; 4], word: [u8; 16]) -> I::F32 {
        let x = word.as_chunks::<4>().0;
        for column in [2, 0, 3, 1] {
            let x = self.0.splat(f32::from_le_bytes(x[column]));
            sum = self.0.mul_add(codes[column], x, sum);
        }
        sum
    }

    #[inline(always)]
    fn load(self, bits: &[u32; LANES]) -> I::F32 {
        self.0.from_bits(self.0.load_i32(bits))
    }

    #[inline(always)]
    fn store(self, bits: &mut [u32; LANES], sum: I::F32) {
        self.0.store_i32(bits, self.0.to_bits(sum));
    }

    #[inline(always)]
    fn splat(self, bits: u32) -> I::F32 {
        self.0.splat(f32::from_bits(bits))
    }

    #[inline(always)]
    fn value(self, sum: I::F32) -> I::F32 {
        sum
    }

    fn vectorize<K: MultiplyKernel>(self, kernel: K) -> K::Output {
        self.0.vectorize(Within { by: self, kernel })
    }
}

/// Whether activations that bfloat16 holds are best held in it on `token`.
pub(crate) fn prefers_bf16(token: Token) -> bool {
    match token {
        #[cfg(target_arch = "x86_64")]
        Token::Avx512(isa) => x86::Bf16::<false>::if_faster(isa).is_some(),
        _ => false,
    }
}

/// Runs `kernel` on the instruction set of `token` in bytes, for codes up to `max_code`.
pub(crate) fn dispatch_bytes<K: MultiplyKernel>(token: Token, max_code: u8, kernel: K) -> K::Output {
    dispatch_dot(token, max_code, InBytes(kernel))
}

/// Runs `kernel` on the instruction set of `token`, multiplying codes up to `max_code` with words of f32, or of
/// bfloat16 (`bf16`) where [`prefers_bf16`]. Panics where it has not.
pub(crate) fn dispatch_floats<K: MultiplyKernel>(
    token: Token,
    bf16: bool,
    max_code: u8,
    kernel: K,
) -> K::Output {
    #[cfg(target_arch = "x86_64")]
    const HELD: &str = "activations are held in bfloat16 only for it";
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (bf16, max_code);
    match token {
        #[cfg(target_arch = "x86_64")]
        Token::Avx512(isa) if bf16 && max_code < 32 => {
            x86::Bf16::<true>::detect(isa).expect(HELD).vectorize(kernel)
        }
        #[cfg(target_arch = "x86_64")]
        Token::Avx512(isa) if bf16 => x86::Bf16::<false>::detect(isa).expect(HELD).vectorize(kernel),
        #[cfg(target_arch = "x86_64")]
        Token::Avx512(isa) => Floats(isa).vectorize(kernel),
        #[cfg(target_arch = "x86_64")]
        Token::Avx2(isa) => Floats(isa).vectorize(kernel),
        #[cfg(target_arch = "aarch64")]
        Token::Neon(isa) => Floats(isa).vectorize(kernel),
        Token::Scalar(isa) => Floats(isa).vectorize(kernel),
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::super::{Avx512, Isa, LANES};
    use super::{Multiply, MultiplyKernel};

    /// AVX-512 with its products of bfloat16; `NARROW` promises codes below 32.
    #[derive(Clone, Copy)]
    pub(super) struct Bf16<const NARROW: bool>(Avx512);

    impl<const NARROW: bool> Bf16<NARROW> {
        /// The token, if the CPU has them besides.
        pub(super) fn detect(isa: Avx512) -> Option<Self> {
            is_x86_feature_detected!("avx512bf16").then_some(Self(isa))
        }

        /// The token, if they are also faster than f32. Measured: twice as fast on AMD's Zen 4, half as fast on
        /// Intel's Sapphire Rapids, which leaves such work to AMX.
        pub(super) fn if_faster(isa: Avx512) -> Option<Self> {
            Self::detect(isa).filter(|_| amd())
        }
    }

    impl<const NARROW: bool> Multiply for Bf16<NARROW> {
        type Isa = Avx512;
        type Sum = __m512;
        /// Columns 0 and 2, then 1 and 3.
        type Codes = [__m512i; 2];
        /// In the same order.
        type Word = [u8; 8];
        const MAX_BITS: u32 = if NARROW { 5 } else { 8 };
        // Wide codes take registers on their way to bfloat16.
        const TILE_ROWS: usize = if NARROW { Avx512::TILE_ROWS } else { Avx512::TILE_ROWS - 1 };
        const TILE_VECTORS: usize = Avx512::TILE_VECTORS;

        #[inline(always)]
        fn isa(self) -> Avx512 {
            self.0
        }

        #[inline(always)]
        fn words(bytes: &[u8]) -> &[[u8; 8]] {
            bytes.as_chunks().0
        }

        #[inline(always)]
        fn codes(self, codes: __m512i) -> [__m512i; 2] {
            // SAFETY: the token proves the features.
            unsafe { [pairs::<NARROW>(codes), pairs::<NARROW>(_mm512_srli_epi32::<8>(codes))] }
        }

        #[inline(always)]
        fn multiply(self, sum: __m512, codes: [__m512i; 2], word: [u8; 8]) -> __m512 {
            let x = word.as_chunks::<4>().0;
            // SAFETY: `detect` found the instruction.
            unsafe {
                let sum = dot(sum, codes[0], i32::from_le_bytes(x[0]));
                dot(sum, codes[1], i32::from_le_bytes(x[1]))
            }
        }

        #[inline(always)]
        fn load(self, bits: &[u32; LANES]) -> __m512 {
            super::Floats(self.0).load(bits)
        }

        #[inline(always)]
        fn store(self, bits: &mut [u32; LANES], sum: __m512) {
            super::Floats(self.0).store(bits, sum);
        }

        #[inline(always)]
        fn splat(self, bits: u32) -> __m512 {
            super::Floats(self.0).splat(bits)
        }

        #[inline(always)]
        fn value(self, sum: __m512) -> __m512 {
            sum
        }

        fn vectorize<K: MultiplyKernel>(self, kernel: K) -> K::Output {
            // SAFETY: the token proves the features of `Avx512`, and `detect` found bfloat16.
            unsafe { with_bf16(self, kernel) }
        }
    }

    /// Whether AMD made this CPU.
    fn amd() -> bool {
        #[allow(unused_unsafe, reason = "safe since Rust 1.94; `expect` would fail with those before it")]
        // SAFETY: every x86-64 has the instruction.
        let leaf = unsafe { __cpuid(0) };
        [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).as_flattened() == b"AuthenticAMD"
    }

    /// Compiles `kernel` for the features of [`Avx512`] and bfloat16.
    ///
    /// # Safety
    ///
    /// The CPU must have all of them.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16,avx2,fma,f16c,bmi2")]
    #[inline(never)]
    unsafe fn with_bf16<const NARROW: bool, K: MultiplyKernel>(by: Bf16<NARROW>, kernel: K) -> K::Output {
        kernel.run(by)
    }

    /// 0 to 31 as bfloat16.
    const SMALL: [u16; 32] = {
        let mut table = [0; 32];
        let mut i = 0;
        while i < 32 {
            table[i] = ((i as f32).to_bits() >> 16) as u16;
            i += 1;
        }
        table
    };

    /// Bytes 0 and 2 of each lane as two bfloat16.
    ///
    /// # Safety
    ///
    /// The CPU must have AVX-512F and AVX-512BW.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn pairs<const NARROW: bool>(codes: __m512i) -> __m512i {
        if NARROW {
            // The lookup goes by the lowest five bits of each half.
            // SAFETY: the table is 64 bytes.
            let table = unsafe { _mm512_loadu_si512(SMALL.as_ptr().cast()) };
            return _mm512_permutexvar_epi16(codes, table);
        }
        let even = _mm512_cvtepi32_ps(_mm512_and_si512(codes, _mm512_set1_epi32(255)));
        let odd =
            _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32::<16>(codes), _mm512_set1_epi32(255)));
        let even = _mm512_srli_epi32::<16>(_mm512_castps_si512(even));
        // The high half of `odd`, the low half of `even`, which has no other: a | b.
        _mm512_or_si512(_mm512_castps_si512(odd), even)
    }

    /// Lane `i` of `sum` plus the products of pair `i` of `codes` with the pair `x`, the second first.
    ///
    /// # Safety
    ///
    /// The CPU must have AVX-512 with bfloat16.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn dot(sum: __m512, codes: __m512i, x: i32) -> __m512 {
        _mm512_dpbf16_ps(sum, as_bf16(codes), as_bf16(_mm512_set1_epi32(x)))
    }

    /// The same bits.
    #[inline(always)]
    fn as_bf16(bits: __m512i) -> __m512bh {
        #[expect(clippy::disallowed_methods, reason = "there is no intrinsic for it")]
        // SAFETY: both are 512 bits, and any of them are pairs of bfloat16.
        unsafe {
            std::mem::transmute::<__m512i, __m512bh>(bits)
        }
    }
}
