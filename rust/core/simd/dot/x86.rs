//! Dot products of bytes on x86-64.

use std::arch::x86_64::*;
use std::ops::RangeInclusive;

use super::{Dot, DotKernel};
use crate::simd::amx::Amx;
use crate::simd::{Avx2, Avx512, VECTORS};

/// AVX2; `NARROW` promises codes below 128. The ports bound it: three instructions for 32 products, or four.
#[derive(Clone, Copy)]
pub(super) struct Avx2Dot<const NARROW: bool>(pub(super) Avx2);

impl<const NARROW: bool> Dot for Avx2Dot<NARROW> {
    type Isa = Avx2;
    const TILE_ROWS: usize = 4;
    const TILE_VECTORS: usize = VECTORS;
    const ABREAST: bool = false;
    const OFFSET: i32 = if NARROW { 0 } else { 128 };
    // Codes of fewer bits have sums of their own: see `Short`.
    const BITS: RangeInclusive<usize> = if NARROW { 5..=7 } else { 8..=8 };

    #[inline(always)]
    fn isa(self) -> Avx2 {
        self.0
    }

    #[inline(always)]
    fn dot(self, acc: [__m256i; 2], codes: [__m256i; 2], word: i32) -> [__m256i; 2] {
        // SAFETY: the token proves AVX2.
        unsafe { [dot_ymm::<NARROW>(acc[0], codes[0], word), dot_ymm::<NARROW>(acc[1], codes[1], word)] }
    }
}

/// Eight lanes of [`Dot::dot`]. Wide codes less 128 give `x` their signs, so that their magnitudes, at most 128, are
/// the unsigned operand, and no sum of two products leaves 16 bits.
///
/// # Safety
///
/// The CPU must have AVX2.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn dot_ymm<const NARROW: bool>(acc: __m256i, codes: __m256i, word: i32) -> __m256i {
    let x = _mm256_set1_epi32(word);
    let pairs = if NARROW {
        _mm256_maddubs_epi16(codes, x)
    } else {
        let codes = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
        _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(x, codes))
    };
    _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
}

/// AVX2 with `vpdpbusd`, in one of its two encodings for the registers of AVX2: that of AVX-VNNI, or (`EVEX`)
/// that of AVX-512 VNNI, for CPUs that have it without all that [`Avx512`] wants.
#[derive(Clone, Copy)]
pub(super) struct Avx2Vnni<const EVEX: bool>(Avx2);

impl<const EVEX: bool> Avx2Vnni<EVEX> {
    /// The token, if the CPU has the instruction in this encoding besides.
    pub(super) fn detect(isa: Avx2) -> Option<Self> {
        let has = match EVEX {
            false => is_x86_feature_detected!("avxvnni"),
            true => is_x86_feature_detected!("avx512vnni") && is_x86_feature_detected!("avx512vl"),
        };
        has.then_some(Self(isa))
    }
}

impl<const EVEX: bool> Dot for Avx2Vnni<EVEX> {
    type Isa = Avx2;
    const INSTRUCTION: bool = true;

    #[inline(always)]
    fn isa(self) -> Avx2 {
        self.0
    }

    #[inline(always)]
    fn dot(self, acc: [__m256i; 2], codes: [__m256i; 2], word: i32) -> [__m256i; 2] {
        // SAFETY: the token proves AVX2, and `detect` found the encoding.
        unsafe { [dpbusd_ymm::<EVEX>(acc[0], codes[0], word), dpbusd_ymm::<EVEX>(acc[1], codes[1], word)] }
    }

    fn vectorize<K: DotKernel>(self, kernel: K) -> K::Output {
        // SAFETY: the token proves the features of `Avx2`, and `detect` found the encoding.
        unsafe {
            match EVEX {
                false => with_vnni_vex(self, kernel),
                true => with_vnni_evex(self, kernel),
            }
        }
    }
}

/// Eight lanes of [`Dot::dot`].
///
/// # Safety
///
/// The CPU must have AVX2 and `vpdpbusd` in that encoding.
#[inline(always)]
unsafe fn dpbusd_ymm<const EVEX: bool>(acc: __m256i, codes: __m256i, word: i32) -> __m256i {
    // SAFETY: the caller knows that the CPU has the instruction; the operands are values.
    unsafe {
        let x = _mm256_set1_epi32(word);
        match EVEX {
            false => _mm256_dpbusd_avx_epi32(acc, codes, x),
            true => _mm256_dpbusd_epi32(acc, codes, x),
        }
    }
}

/// Compiles `kernel` for the features of [`Avx2`] and AVX-VNNI.
///
/// # Safety
///
/// The CPU must have all of them.
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,avxvnni")]
#[inline(never)]
unsafe fn with_vnni_vex<D: Dot, K: DotKernel>(dot: D, kernel: K) -> K::Output {
    kernel.run(dot)
}

/// Compiles `kernel` for the features of [`Avx2`] and the VNNI of AVX-512.
///
/// # Safety
///
/// The CPU must have all of them.
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,avx512vl,avx512vnni")]
#[inline(never)]
unsafe fn with_vnni_evex<D: Dot, K: DotKernel>(dot: D, kernel: K) -> K::Output {
    kernel.run(dot)
}

/// AVX-512 without VNNI; `NARROW` promises codes below 128.
#[derive(Clone, Copy)]
pub(super) struct Avx512Dot<const NARROW: bool>(pub(super) Avx512);

impl<const NARROW: bool> Dot for Avx512Dot<NARROW> {
    type Isa = Avx512;
    const BITS: RangeInclusive<usize> = if NARROW { 1..=7 } else { 8..=8 };

    #[inline(always)]
    fn isa(self) -> Avx512 {
        self.0
    }

    #[inline(always)]
    fn dot(self, acc: __m512i, codes: __m512i, word: i32) -> __m512i {
        // SAFETY: the token proves AVX-512F and AVX-512BW.
        unsafe { dot_zmm::<NARROW>(acc, codes, word) }
    }
}

/// Sixteen lanes of [`Dot::dot`].
///
/// # Safety
///
/// The CPU must have AVX-512F and AVX-512BW.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn dot_zmm<const NARROW: bool>(acc: __m512i, codes: __m512i, word: i32) -> __m512i {
    let x = _mm512_set1_epi32(word);
    if NARROW {
        let pairs = _mm512_maddubs_epi16(codes, x);
        return _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
    }
    let even = _mm512_madd_epi16(
        _mm512_and_si512(codes, _mm512_set1_epi16(0xff)),
        _mm512_srai_epi16::<8>(_mm512_slli_epi16::<8>(x)),
    );
    let odd = _mm512_madd_epi16(_mm512_srli_epi16::<8>(codes), _mm512_srai_epi16::<8>(x));
    _mm512_add_epi32(acc, _mm512_add_epi32(even, odd))
}

/// AVX-512 with VNNI, and with AMX where there is that too.
#[derive(Clone, Copy)]
pub(super) struct Vnni {
    isa: Avx512,
    amx: Option<Amx>,
}

impl Vnni {
    /// The token, if the CPU has VNNI besides.
    pub(super) fn detect(isa: Avx512) -> Option<Self> {
        is_x86_feature_detected!("avx512vnni").then(|| Self { isa, amx: Amx::detect() })
    }
}

impl Dot for Vnni {
    type Isa = Avx512;
    const INSTRUCTION: bool = true;

    #[inline(always)]
    fn isa(self) -> Avx512 {
        self.isa
    }

    #[inline(always)]
    fn blocks(self) -> Option<Amx> {
        self.amx
    }

    #[inline(always)]
    fn dot(self, acc: __m512i, codes: __m512i, word: i32) -> __m512i {
        // SAFETY: `detect` found VNNI.
        unsafe { _mm512_dpbusd_epi32(acc, codes, _mm512_set1_epi32(word)) }
    }

    fn vectorize<K: DotKernel>(self, kernel: K) -> K::Output {
        // SAFETY: the token proves the features of `Avx512`, and `detect` found VNNI.
        unsafe { with_vnni(self, kernel) }
    }
}

/// Compiles `kernel` for the features of [`Avx512`] and VNNI.
///
/// # Safety
///
/// The CPU must have all of them.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,avx2,fma,f16c,bmi2")]
#[inline(never)]
unsafe fn with_vnni<K: DotKernel>(dot: Vnni, kernel: K) -> K::Output {
    kernel.run(dot)
}
