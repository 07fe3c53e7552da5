//! How unsigned codes meet activations in floats: in f32 or in bfloat16.
//!
//! A code is exact in either, in eight bits of significand. A word of four columns is multiplied in steps, of one
//! column in f32, of two in bfloat16, its products added one after the other: columns 2, 0, 3, 1, the order in which
//! `vdpbf16ps` takes two pairs. With fused multiply-adds in that order f32 gives the same bits as bfloat16 does, for
//! activations that bfloat16 holds.

#![cfg_attr(
    target_arch = "x86_64",
    expect(unsafe_code, reason = "a token proves that the CPU has the instructions")
)]

use std::ops::RangeInclusive;

use super::{Isa, Kernel, LANES, Token};

/// An instruction set and its way of multiplying codes with activations in floats; sums are f32.
pub(crate) trait Products: Copy + Send + Sync {
    /// The instruction set.
    type Isa: Isa;
    /// 16 rows' codes of one step.
    type Codes: Copy;
    /// The activations of one step, for all lanes.
    type X: Copy;
    /// Steps of a word of four columns.
    const STEPS: usize;
    /// Bits of the codes that it is chosen for: few rows have kernels of their own for no others.
    const BITS: RangeInclusive<usize>;

    /// The token of the instruction set.
    fn isa(self) -> Self::Isa;
    /// The codes of step `step` of a word.
    fn codes(self, word: <Self::Isa as Isa>::U8, step: usize) -> Self::Codes;
    /// Codes from memory.
    fn load(self, from: &[u32; LANES]) -> Self::Codes;
    /// Codes to memory.
    fn store(self, to: &mut [u32; LANES], codes: Self::Codes);
    /// Activations, from their bytes.
    fn splat(self, x: [u8; 4]) -> Self::X;
    /// `sum` plus the products of `codes` with `x`.
    fn multiply(
        self,
        sum: <Self::Isa as Isa>::F32,
        codes: Self::Codes,
        x: Self::X,
    ) -> <Self::Isa as Isa>::F32;

    /// Runs `kernel` with the instructions of these products enabled.
    fn vectorize<K: ProductsKernel>(self, kernel: K) -> K::Output;
}

/// Like [`Kernel`], for algorithms that need [`Products`].
pub(crate) trait ProductsKernel {
    /// What it returns.
    type Output;
    /// The algorithm.
    fn run<P: Products>(self, by: P) -> Self::Output;
}

/// A kernel that already knows how it multiplies, to be run by the instruction set of that.
struct Within<P, K> {
    by: P,
    kernel: K,
}

impl<P: Products, K: ProductsKernel> Kernel for Within<P, K> {
    type Output = K::Output;

    #[inline(always)]
    fn run<I: Isa>(self, _: I) -> K::Output {
        self.kernel.run(self.by)
    }
}

/// f32 by fused multiply-adds; `NARROW` promises codes below 16.
#[derive(Clone, Copy)]
struct Floats<I, const NARROW: bool>(I);

impl<I: Isa, const NARROW: bool> Products for Floats<I, NARROW> {
    type Isa = I;
    type Codes = I::F32;
    type X = I::F32;
    const STEPS: usize = 4;
    const BITS: RangeInclusive<usize> = if NARROW { 1..=4 } else { 5..=8 };

    #[inline(always)]
    fn isa(self) -> I {
        self.0
    }

    #[inline(always)]
    fn codes(self, word: I::U8, step: usize) -> I::F32 {
        let (isa, word) = (self.0, self.0.words(word));
        match (step, NARROW) {
            (0, true) => isa.nibble_to_f32::<2>(word),
            (1, true) => isa.nibble_to_f32::<0>(word),
            (2, true) => isa.nibble_to_f32::<3>(word),
            (_, true) => isa.nibble_to_f32::<1>(word),
            (0, false) => isa.to_f32(isa.byte::<2>(word)),
            (1, false) => isa.to_f32(isa.byte::<0>(word)),
            (2, false) => isa.to_f32(isa.byte::<3>(word)),
            (_, false) => isa.to_f32(isa.byte::<1>(word)),
        }
    }

    #[inline(always)]
    fn load(self, from: &[u32; LANES]) -> I::F32 {
        self.0.from_bits(self.0.load_i32(from))
    }

    #[inline(always)]
    fn store(self, to: &mut [u32; LANES], codes: I::F32) {
        self.0.store_i32(to, self.0.to_bits(codes));
    }

    #[inline(always)]
    fn splat(self, x: [u8; 4]) -> I::F32 {
        self.0.splat(f32::from_le_bytes(x))
    }

    #[inline(always)]
    fn multiply(self, sum: I::F32, codes: I::F32, x: I::F32) -> I::F32 {
        self.0.mul_add(codes, x, sum)
    }

    fn vectorize<K: ProductsKernel>(self, kernel: K) -> K::Output {
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

/// Runs `kernel` on the instruction set of `token`, multiplying codes up to `max_code` in f32, or in bfloat16
/// (`bf16`) where [`prefers_bf16`]. Panics where it has not.
pub(crate) fn dispatch_products<K: ProductsKernel>(
    token: Token,
    bf16: bool,
    max_code: u8,
    kernel: K,
) -> K::Output {
    #[cfg(target_arch = "x86_64")]
    const HELD: &str = "activations are held in bfloat16 only for it";
    #[cfg(not(target_arch = "x86_64"))]
    let _ = bf16;
    match token {
        #[cfg(target_arch = "x86_64")]
        Token::Avx512(isa) if bf16 && max_code < 32 => {
            x86::Bf16::<true>::detect(isa).expect(HELD).vectorize(kernel)
        }
        #[cfg(target_arch = "x86_64")]
        Token::Avx512(isa) if bf16 => x86::Bf16::<false>::detect(isa).expect(HELD).vectorize(kernel),
        #[cfg(target_arch = "x86_64")]
        Token::Avx512(isa) => in_f32(isa, max_code, kernel),
        #[cfg(target_arch = "x86_64")]
        Token::Avx2(isa) => in_f32(isa, max_code, kernel),
        #[cfg(target_arch = "aarch64")]
        Token::Neon(isa) => in_f32(isa, max_code, kernel),
        Token::Scalar(isa) => in_f32(isa, max_code, kernel),
    }
}

fn in_f32<I: Isa, K: ProductsKernel>(isa: I, max_code: u8, kernel: K) -> K::Output {
    if max_code < 16 {
        Floats::<I, true>(isa).vectorize(kernel)
    } else {
        Floats::<I, false>(isa).vectorize(kernel)
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::ops::RangeInclusive;

    use super::super::{Avx512, Isa, LANES};
    use super::{Products, ProductsKernel};

    /// AVX-512 with its products of bfloat16; `NARROW` promises codes below 32.
    #[derive(Clone, Copy)]
    pub(super) struct Bf16<const NARROW: bool>(Avx512);

    impl<const NARROW: bool> Bf16<NARROW> {
        /// The token, if the CPU has them besides.
        pub(super) fn detect(isa: Avx512) -> Option<Self> {
            is_x86_feature_detected!("avx512bf16").then_some(Self(isa))
        }

        /// The token, if they are also faster than f32. Measured: twice as fast on AMD's Zen 4, half as fast on
        /// Intel's Sapphire Rapids, which leaves such work to AMX. Tests use them wherever they are.
        pub(super) fn if_faster(isa: Avx512) -> Option<Self> {
            Self::detect(isa).filter(|_| cfg!(test) || amd())
        }
    }

    impl<const NARROW: bool> Products for Bf16<NARROW> {
        type Isa = Avx512;
        /// Columns 0 and 2, or 1 and 3.
        type Codes = __m512i;
        /// In the same order.
        type X = i32;
        const STEPS: usize = 2;
        const BITS: RangeInclusive<usize> = if NARROW { 1..=5 } else { 6..=8 };

        #[inline(always)]
        fn isa(self) -> Avx512 {
            self.0
        }

        #[inline(always)]
        fn codes(self, word: __m512i, step: usize) -> __m512i {
            // SAFETY: the token proves the features.
            unsafe {
                match step {
                    0 => pairs::<NARROW>(word),
                    _ => pairs::<NARROW>(_mm512_srli_epi32::<8>(word)),
                }
            }
        }

        #[inline(always)]
        fn load(self, from: &[u32; LANES]) -> __m512i {
            self.0.load_i32(from)
        }

        #[inline(always)]
        fn store(self, to: &mut [u32; LANES], codes: __m512i) {
            self.0.store_i32(to, codes);
        }

        #[inline(always)]
        fn splat(self, x: [u8; 4]) -> i32 {
            i32::from_le_bytes(x)
        }

        #[inline(always)]
        fn multiply(self, sum: __m512, codes: __m512i, x: i32) -> __m512 {
            // SAFETY: `detect` found the instruction.
            unsafe { dot(sum, codes, x) }
        }

        fn vectorize<K: ProductsKernel>(self, kernel: K) -> K::Output {
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
    unsafe fn with_bf16<const NARROW: bool, K: ProductsKernel>(by: Bf16<NARROW>, kernel: K) -> K::Output {
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
