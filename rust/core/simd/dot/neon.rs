//! Dot products of bytes on aarch64.

use std::arch::aarch64::*;
use std::arch::{asm, is_aarch64_feature_detected};

use super::{Dot, DotKernel};
use crate::simd::Neon;

/// NEON without the dot product extensions: products widened to 32 bits.
#[derive(Clone, Copy)]
pub(super) struct NeonDot(pub(super) Neon);

impl Dot for NeonDot {
    type Isa = Neon;
    const TILE_ROWS: usize = 2;

    #[inline(always)]
    fn isa(self) -> Neon {
        self.0
    }

    #[inline(always)]
    fn dot(self, acc: [int32x4_t; 4], codes: [uint8x16_t; 4], word: i32) -> [int32x4_t; 4] {
        // SAFETY: NEON is part of every aarch64.
        let quarter = |i: usize| unsafe { dot_q(acc[i], codes[i], word) };
        [quarter(0), quarter(1), quarter(2), quarter(3)]
    }
}

/// Four lanes of [`Dot::dot`].
///
/// # Safety
///
/// The CPU must have NEON.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn dot_q(acc: int32x4_t, codes: uint8x16_t, word: i32) -> int32x4_t {
    let x = vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(word))));
    let low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(codes)));
    let high = vreinterpretq_s16_u16(vmovl_u8(vget_high_u8(codes)));
    let lanes01 = vpaddq_s32(vmull_s16(vget_low_s16(low), x), vmull_s16(vget_high_s16(low), x));
    let lanes23 = vpaddq_s32(vmull_s16(vget_low_s16(high), x), vmull_s16(vget_high_s16(high), x));
    vaddq_s32(acc, vpaddq_s32(lanes01, lanes23))
}

/// NEON with `usdot`, the dot product of unsigned bytes with signed ones.
#[derive(Clone, Copy)]
pub(super) struct Usdot(Neon);

impl Usdot {
    /// The token, if the CPU has the extension besides NEON.
    pub(super) fn detect(isa: Neon) -> Option<Self> {
        is_aarch64_feature_detected!("i8mm").then_some(Self(isa))
    }
}

impl Dot for Usdot {
    type Isa = Neon;
    const INSTRUCTION: bool = true;
    const TILE_ROWS: usize = 4;

    #[inline(always)]
    fn isa(self) -> Neon {
        self.0
    }

    #[inline(always)]
    fn dot(self, acc: [int32x4_t; 4], codes: [uint8x16_t; 4], word: i32) -> [int32x4_t; 4] {
        // SAFETY: `detect` found the extension.
        unsafe { dot_usdot(acc, codes, word) }
    }

    fn vectorize<K: DotKernel>(self, kernel: K) -> K::Output {
        // SAFETY: as for `dot`.
        unsafe { with_i8mm(self, kernel) }
    }
}

/// Compiles `kernel` for NEON and its products of integer matrices, to which `usdot` belongs.
///
/// # Safety
///
/// The CPU must have both.
#[target_feature(enable = "neon,i8mm")]
#[inline(never)]
unsafe fn with_i8mm<K: DotKernel>(dot: Usdot, kernel: K) -> K::Output {
    kernel.run(dot)
}

/// [`Dot::dot`] by `usdot`.
///
/// # Safety
///
/// The CPU must have NEON and its products of integer matrices.
#[inline]
#[target_feature(enable = "neon,i8mm")]
unsafe fn dot_usdot(acc: [int32x4_t; 4], codes: [uint8x16_t; 4], word: i32) -> [int32x4_t; 4] {
    let x = vreinterpretq_s8_s32(vdupq_n_s32(word));
    // SAFETY: the features of `usdot` are those of this function.
    let quarter = |i: usize| unsafe { usdot(acc[i], codes[i], x) };
    [quarter(0), quarter(1), quarter(2), quarter(3)]
}

/// Lane `i` of `acc` plus the products of the unsigned bytes 4·i … 4·i + 3 of `a` with the signed ones of `b`.
///
/// # Safety
///
/// The CPU must have NEON and its products of integer matrices.
#[inline]
#[target_feature(enable = "neon,i8mm")]
unsafe fn usdot(acc: int32x4_t, a: uint8x16_t, b: int8x16_t) -> int32x4_t {
    let mut sum = acc;
    // SAFETY: the instruction belongs to the features of this function and touches registers only.
    unsafe {
        asm!(
            "usdot {0:v}.4s, {1:v}.16b, {2:v}.16b",
            inout(vreg) sum,
            in(vreg) a,
            in(vreg) b,
            options(pure, nomem, nostack),
        );
    }
    sum
}

/// Proof that the CPU has `sdot`, the signed dot product of bytes.
#[derive(Clone, Copy)]
pub(super) struct Sdot(Neon);

impl Sdot {
    /// The token, if the CPU has the extension besides NEON.
    pub(super) fn detect(isa: Neon) -> Option<Self> {
        is_aarch64_feature_detected!("dotprod").then_some(Self(isa))
    }
}

/// NEON with `sdot`; `NARROW` promises codes below 128, which are signed bytes as they are.
#[derive(Clone, Copy)]
pub(super) struct SdotDot<const NARROW: bool>(pub(super) Sdot);

impl<const NARROW: bool> Dot for SdotDot<NARROW> {
    type Isa = Neon;
    const TILE_ROWS: usize = 4;
    const OFFSET: i32 = if NARROW { 0 } else { 128 };

    #[inline(always)]
    fn isa(self) -> Neon {
        self.0.0
    }

    #[inline(always)]
    fn dot(self, acc: [int32x4_t; 4], codes: [uint8x16_t; 4], word: i32) -> [int32x4_t; 4] {
        // SAFETY: `Sdot` proves the extension.
        unsafe { dot_sdot::<NARROW>(acc, codes, word) }
    }

    fn vectorize<K: DotKernel>(self, kernel: K) -> K::Output {
        // SAFETY: as for `dot`.
        unsafe { with_dotprod(self, kernel) }
    }
}

/// Compiles `kernel` for NEON and its dot products.
///
/// # Safety
///
/// The CPU must have both.
#[target_feature(enable = "neon,dotprod")]
#[inline(never)]
unsafe fn with_dotprod<const NARROW: bool, K: DotKernel>(dot: SdotDot<NARROW>, kernel: K) -> K::Output {
    kernel.run(dot)
}

/// [`Dot::dot`] by `sdot`: less 128, wide codes are signed bytes too.
///
/// # Safety
///
/// The CPU must have NEON and its dot products.
#[inline]
#[target_feature(enable = "neon,dotprod")]
unsafe fn dot_sdot<const NARROW: bool>(
    acc: [int32x4_t; 4],
    codes: [uint8x16_t; 4],
    word: i32,
) -> [int32x4_t; 4] {
    let x = vreinterpretq_s8_s32(vdupq_n_s32(word));
    // SAFETY: the features of `sdot` are those of this function.
    let quarter = |i: usize| unsafe {
        let codes = if NARROW { codes[i] } else { veorq_u8(codes[i], vdupq_n_u8(128)) };
        sdot(acc[i], vreinterpretq_s8_u8(codes), x)
    };
    [quarter(0), quarter(1), quarter(2), quarter(3)]
}

/// Lane `i` of `acc` plus the products of the signed bytes 4·i … 4·i + 3 of both operands.
///
/// # Safety
///
/// The CPU must have NEON and its dot products.
#[inline]
#[target_feature(enable = "neon,dotprod")]
unsafe fn sdot(acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    let mut sum = acc;
    // SAFETY: the instruction belongs to the features of this function and touches registers only.
    unsafe {
        asm!(
            "sdot {0:v}.4s, {1:v}.16b, {2:v}.16b",
            inout(vreg) sum,
            in(vreg) a,
            in(vreg) b,
            options(pure, nomem, nostack),
        );
    }
    sum
}
