//! NEON: a logical vector is four q registers.
//!
//! NEON belongs to the baseline of every 64-bit Arm target, so the crate is compiled for it throughout and no
//! trampoline is needed. Half precision is converted by inline assembly (`fcvtl`, `fcvtn`): the instructions are
//! baseline too, their intrinsics are younger than the oldest compiler supported.

#![expect(
    unsafe_code,
    reason = "vector intrinsics are unsafe to call from functions without target features"
)]

use std::arch::aarch64::*;
use std::arch::{asm, is_aarch64_feature_detected};

use half::{bf16, f16};

use super::{Isa, Kernel};

/// Proof that the CPU has NEON.
#[derive(Debug, Clone, Copy)]
pub struct Neon(());

impl Neon {
    /// The token, if this CPU has NEON.
    pub fn detect() -> Option<Self> {
        is_aarch64_feature_detected!("neon").then_some(Self(()))
    }
}

/// 16 lanes of u64 as their low and their high halves: `umull` wants the low halves of neighbours side by side.
#[derive(Clone, Copy)]
pub struct Wide {
    low: [uint32x4_t; 4],
    high: [uint32x4_t; 4],
}

/// Four values, one a register. Spelled out: `array::from_fn` and `map` reach the same code, but the compiler
/// takes several times as long to get there.
#[inline(always)]
fn quads<T>(f: impl Fn(usize) -> T) -> [T; 4] {
    [f(0), f(1), f(2), f(3)]
}

/// An intrinsic without memory operands.
macro_rules! simd {
    ($call:expr) => {
        // SAFETY: a `Neon` token is held wherever this is used, so the CPU has NEON, and the intrinsic
        // takes and returns values only.
        unsafe { $call }
    };
}

/// The same intrinsic on each of the four registers.
macro_rules! each {
    ($f:ident $(::<$n:literal>)? ($($a:expr),*)) => {
        quads(|i| simd!($f $(::<$n>)? ($($a[i]),*)))
    };
}

/// Four registers from 16 lanes in memory.
macro_rules! load {
    ($f:ident, $from:expr, $lanes:literal) => {
        // SAFETY: NEON as above; register `i` covers `$lanes` elements from `i * $lanes`, and the array the
        // reference points to has four times that many. The cast is from bf16 or f16 to their bits.
        quads(|i| unsafe { $f($from.as_ptr().add($lanes * i).cast()) })
    };
}

/// Four registers to memory.
macro_rules! store {
    ($f:ident, $to:expr, $v:expr, $lanes:literal) => {
        let v = $v;
        for i in 0..4 {
            // SAFETY: as for `load!`; the reference is exclusive.
            unsafe { $f($to.as_mut_ptr().add($lanes * i).cast(), v[i]) }
        }
    };
}

/// Four f16 to f32, exact.
#[inline(always)]
fn widen_f16(bits: uint16x4_t) -> float32x4_t {
    let wide;
    // SAFETY: `fcvtl` is baseline NEON and touches the two named registers only.
    unsafe {
        asm!("fcvtl {0:v}.4s, {1:v}.4h", lateout(vreg) wide, in(vreg) bits, options(pure, nomem, nostack));
    }
    wide
}

/// Four f32 to f16, RNE.
#[inline(always)]
fn narrow_f16(v: float32x4_t) -> uint16x4_t {
    let bits;
    // SAFETY: `fcvtn` is baseline NEON and touches the two named registers only.
    unsafe {
        asm!("fcvtn {0:v}.4h, {1:v}.4s", lateout(vreg) bits, in(vreg) v, options(pure, nomem, nostack));
    }
    bits
}

/// Four f32, no NaN but [`f32::NAN`], to bf16, RNE: half a unit less one, plus one where the kept part is odd.
#[inline(always)]
fn narrow_bf16(v: float32x4_t) -> uint16x4_t {
    simd!({
        let bits = vreinterpretq_u32_f32(v);
        let odd = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
        vshrn_n_u32::<16>(vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd))
    })
}

/// Neighbours in one byte: `even | odd << BITS`, in order, 32 bytes to 16.
#[inline(always)]
fn join<const BITS: i32>(a: uint8x16_t, b: uint8x16_t) -> uint8x16_t {
    simd!(vsliq_n_u8::<BITS>(vuzp1q_u8(a, b), vuzp2q_u8(a, b)))
}

/// Inverse of [`join`]: the low `BITS` bits of a byte, then the rest.
#[inline(always)]
fn part<const BITS: i32>(a: uint8x16_t) -> [uint8x16_t; 2] {
    simd!({
        let low = vandq_u8(a, vdupq_n_u8((1 << BITS) - 1));
        let high = vshrq_n_u8::<BITS>(a);
        [vzip1q_u8(low, high), vzip2q_u8(low, high)]
    })
}

impl Isa for Neon {
    type F32 = [float32x4_t; 4];
    type I32 = [int32x4_t; 4];
    type Mask = [uint32x4_t; 4];
    type U8 = [uint8x16_t; 4];
    type Wide = Wide;

    const NAME: &'static str = "neon";
    const TILE_ROWS: usize = 6;
    const TILE_VECTORS: usize = 1;

    #[inline(never)]
    fn vectorize<K: Kernel>(self, kernel: K) -> K::Output {
        kernel.run(self)
    }

    // ---- f32 ----------------------------------------------------------------------------------------------

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F32 {
        [simd!(vdupq_n_f32(value)); 4]
    }
    #[inline(always)]
    fn load(self, from: &[f32; 16]) -> Self::F32 {
        load!(vld1q_f32, from, 4)
    }
    #[inline(always)]
    fn load_f64(self, from: &[f64; 16]) -> Self::F32 {
        let low: [float64x2_t; 4] = load!(vld1q_f64, from[..8], 2);
        let high: [float64x2_t; 4] = load!(vld1q_f64, from[8..], 2);
        let narrow = |a, b| simd!(vcvt_high_f32_f64(vcvt_f32_f64(a), b));
        [narrow(low[0], low[1]), narrow(low[2], low[3]), narrow(high[0], high[1]), narrow(high[2], high[3])]
    }
    #[inline(always)]
    fn load_bf16(self, from: &[bf16; 16]) -> Self::F32 {
        let bits: [uint16x4_t; 4] = load!(vld1_u16, from, 4);
        quads(|i| simd!(vreinterpretq_f32_u32(vshll_n_u16::<16>(bits[i]))))
    }
    #[inline(always)]
    fn load_f16(self, from: &[f16; 16]) -> Self::F32 {
        let bits: [uint16x4_t; 4] = load!(vld1_u16, from, 4);
        quads(|i| widen_f16(bits[i]))
    }
    // Arm's non-temporal pair (`stnp`) is a hint that cores are free to ignore: STREAM stores plainly.
    #[inline(always)]
    fn store<const STREAM: bool>(self, to: &mut [f32; 16], v: Self::F32) {
        store!(vst1q_f32, to, v, 4);
    }
    #[inline(always)]
    fn store_f64<const STREAM: bool>(self, to: &mut [f64; 16], v: Self::F32) {
        let low = quads(|i| simd!(vcvt_f64_f32(vget_low_f32(v[i]))));
        let high = quads(|i| simd!(vcvt_high_f64_f32(v[i])));
        store!(vst1q_f64, to[..8], [low[0], high[0], low[1], high[1]], 2);
        store!(vst1q_f64, to[8..], [low[2], high[2], low[3], high[3]], 2);
    }
    #[inline(always)]
    fn store_bf16<const STREAM: bool>(self, to: &mut [bf16; 16], v: Self::F32) {
        store!(vst1_u16, to, quads(|i| narrow_bf16(v[i])), 4);
    }
    #[inline(always)]
    fn store_f16<const STREAM: bool>(self, to: &mut [f16; 16], v: Self::F32) {
        store!(vst1_u16, to, quads(|i| narrow_f16(v[i])), 4);
    }
    #[inline(always)]
    fn fence(self) {}

    #[inline(always)]
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        each!(vaddq_f32(a, b))
    }
    #[inline(always)]
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        each!(vsubq_f32(a, b))
    }
    #[inline(always)]
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        each!(vmulq_f32(a, b))
    }
    #[inline(always)]
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        each!(vdivq_f32(a, b))
    }
    #[inline(always)]
    fn mul_add(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        each!(vfmaq_f32(c, a, b))
    }
    #[inline(always)]
    fn neg_mul_add(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        each!(vfmsq_f32(c, a, b))
    }
    #[inline(always)]
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        each!(vminq_f32(a, b))
    }
    #[inline(always)]
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        each!(vmaxq_f32(a, b))
    }
    #[inline(always)]
    fn floor(self, a: Self::F32) -> Self::F32 {
        each!(vrndmq_f32(a))
    }
    #[inline(always)]
    fn to_bits(self, a: Self::F32) -> Self::I32 {
        each!(vreinterpretq_s32_f32(a))
    }
    #[inline(always)]
    fn from_bits(self, a: Self::I32) -> Self::F32 {
        each!(vreinterpretq_f32_s32(a))
    }
    #[inline(always)]
    fn round(self, a: Self::F32) -> Self::I32 {
        each!(vcvtnq_s32_f32(a))
    }
    #[inline(always)]
    fn to_f32(self, a: Self::I32) -> Self::F32 {
        each!(vcvtq_f32_s32(a))
    }
    #[inline(always)]
    fn gt(self, a: Self::F32, b: Self::F32) -> Self::Mask {
        each!(vcgtq_f32(a, b))
    }
    #[inline(always)]
    fn negative(self, a: Self::F32) -> Self::Mask {
        quads(|i| simd!(vcltzq_s32(vreinterpretq_s32_f32(a[i]))))
    }
    #[inline(always)]
    fn select(self, mask: Self::Mask, a: Self::F32, b: Self::F32) -> Self::F32 {
        each!(vbslq_f32(mask, a, b))
    }
    #[inline(always)]
    fn select_i32(self, mask: Self::Mask, a: Self::I32, b: Self::I32) -> Self::I32 {
        each!(vbslq_s32(mask, a, b))
    }
    #[inline(always)]
    fn split<const H: usize>(self, a: Self::F32, b: Self::F32) -> (Self::F32, Self::F32) {
        match H {
            8 => ([a[0], a[1], b[0], b[1]], [a[2], a[3], b[2], b[3]]),
            4 => ([a[0], a[2], b[0], b[2]], [a[1], a[3], b[1], b[3]]),
            2 => {
                let pairs = |v: Self::F32| -> [float64x2_t; 4] { each!(vreinterpretq_f64_f32(v)) };
                let (a, b) = (pairs(a), pairs(b));
                let (low, high): ([_; 4], [_; 4]) = (each!(vzip1q_f64(a, b)), each!(vzip2q_f64(a, b)));
                (each!(vreinterpretq_f32_f64(low)), each!(vreinterpretq_f32_f64(high)))
            }
            _ => (each!(vuzp1q_f32(a, b)), each!(vuzp2q_f32(a, b))),
        }
    }

    // ---- i32 ----------------------------------------------------------------------------------------------

    #[inline(always)]
    fn splat_i32(self, value: i32) -> Self::I32 {
        [simd!(vdupq_n_s32(value)); 4]
    }
    #[inline(always)]
    fn load_i32(self, from: &[u32; 16]) -> Self::I32 {
        let bits: [uint32x4_t; 4] = load!(vld1q_u32, from, 4);
        each!(vreinterpretq_s32_u32(bits))
    }
    #[inline(always)]
    fn store_i32(self, to: &mut [u32; 16], v: Self::I32) {
        let bits: [uint32x4_t; 4] = each!(vreinterpretq_u32_s32(v));
        store!(vst1q_u32, to, bits, 4);
    }
    #[inline(always)]
    fn add_i32(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        each!(vaddq_s32(a, b))
    }
    #[inline(always)]
    fn sub_i32(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        each!(vsubq_s32(a, b))
    }
    #[inline(always)]
    fn mul_i32(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        each!(vmulq_s32(a, b))
    }
    #[inline(always)]
    fn and(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        each!(vandq_s32(a, b))
    }
    #[inline(always)]
    fn or(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        each!(vorrq_s32(a, b))
    }
    #[inline(always)]
    fn xor(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        each!(veorq_s32(a, b))
    }
    // A shift by a register of equal constants becomes the immediate form.
    #[inline(always)]
    fn shl<const N: u32>(self, a: Self::I32) -> Self::I32 {
        quads(|i| simd!(vshlq_s32(a[i], vdupq_n_s32(N as i32))))
    }
    #[inline(always)]
    fn shr<const N: u32>(self, a: Self::I32) -> Self::I32 {
        let right = |v| simd!(vshlq_u32(vreinterpretq_u32_s32(v), vdupq_n_s32(-(N as i32))));
        quads(|i| simd!(vreinterpretq_s32_u32(right(a[i]))))
    }
    #[inline(always)]
    fn sar<const N: u32>(self, a: Self::I32) -> Self::I32 {
        quads(|i| simd!(vshlq_s32(a[i], vdupq_n_s32(-(N as i32)))))
    }
    #[inline(always)]
    fn max_i32(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        each!(vmaxq_s32(a, b))
    }
    #[inline(always)]
    fn max_u32(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        let unsigned = |v: Self::I32| -> [uint32x4_t; 4] { each!(vreinterpretq_u32_s32(v)) };
        let (a, b) = (unsigned(a), unsigned(b));
        quads(|i| simd!(vreinterpretq_s32_u32(vmaxq_u32(a[i], b[i]))))
    }
    #[inline(always)]
    fn repeat_even(self, a: Self::I32) -> Self::I32 {
        each!(vtrn1q_s32(a, a))
    }
    #[inline(always)]
    fn prefix_sum(self, a: Self::I32) -> Self::I32 {
        let zero = simd!(vdupq_n_s32(0));
        let within = quads(|i| {
            simd!({
                let pairs = vaddq_s32(a[i], vextq_s32::<3>(zero, a[i]));
                vaddq_s32(pairs, vextq_s32::<2>(zero, pairs))
            })
        });
        let after = |sums, v| simd!(vaddq_s32(v, vdupq_laneq_s32::<3>(sums)));
        let first = within[0];
        let second = after(first, within[1]);
        let third = after(second, within[2]);
        [first, second, third, after(third, within[3])]
    }
    #[inline(always)]
    fn splat_last(self, a: Self::I32) -> Self::I32 {
        [simd!(vdupq_laneq_s32::<3>(a[3])); 4]
    }

    // ---- u64, for Philox ----------------------------------------------------------------------------------

    #[inline(always)]
    fn wide(self, a: Self::I32) -> Self::Wide {
        let low = each!(vreinterpretq_u32_s32(a));
        Wide { low, high: low }
    }
    #[inline(always)]
    fn wide_splat(self, value: u32) -> Self::Wide {
        let low = [simd!(vdupq_n_u32(value)); 4];
        Wide { low, high: low }
    }
    #[inline(always)]
    fn wide_mul(self, a: Self::Wide, m: u32) -> Self::Wide {
        let halves = |v| {
            simd!({
                let first = vreinterpretq_u32_u64(vmull_u32(vget_low_u32(v), vdup_n_u32(m)));
                let second = vreinterpretq_u32_u64(vmull_high_u32(v, vdupq_n_u32(m)));
                (vuzp1q_u32(first, second), vuzp2q_u32(first, second))
            })
        };
        let products = quads(|i| halves(a.low[i]));
        Wide { low: quads(|i| products[i].0), high: quads(|i| products[i].1) }
    }
    #[inline(always)]
    fn wide_high(self, a: Self::Wide) -> Self::Wide {
        Wide { low: a.high, high: a.high }
    }
    #[inline(always)]
    fn wide_xor3(self, a: Self::Wide, b: Self::Wide, c: Self::Wide) -> Self::Wide {
        let xor3 = |a: [_; 4], b: [_; 4], c: [_; 4]| quads(|i| simd!(veorq_u32(veorq_u32(a[i], b[i]), c[i])));
        Wide { low: xor3(a.low, b.low, c.low), high: xor3(a.high, b.high, c.high) }
    }
    #[inline(always)]
    fn narrow_wide(self, a: Self::Wide) -> Self::I32 {
        let low = a.low;
        each!(vreinterpretq_s32_u32(low))
    }

    // ---- bytes --------------------------------------------------------------------------------------------

    #[inline(always)]
    fn load_u8(self, from: &[u8; 64]) -> Self::U8 {
        load!(vld1q_u8, from, 16)
    }
    #[inline(always)]
    fn store_u8(self, to: &mut [u8; 64], v: Self::U8) {
        store!(vst1q_u8, to, v, 16);
    }
    #[inline(always)]
    fn splat_u8(self, value: u8) -> Self::U8 {
        [simd!(vdupq_n_u8(value)); 4]
    }
    #[inline(always)]
    fn add_u8(self, a: Self::U8, b: Self::U8) -> Self::U8 {
        each!(vaddq_u8(a, b))
    }
    #[inline(always)]
    fn sub_u8(self, a: Self::U8, b: Self::U8) -> Self::U8 {
        each!(vsubq_u8(a, b))
    }
    #[inline(always)]
    fn words(self, a: [uint8x16_t; 4]) -> [int32x4_t; 4] {
        each!(vreinterpretq_s32_u8(a))
    }
    #[inline(always)]
    fn bytes(self, a: [int32x4_t; 4]) -> [uint8x16_t; 4] {
        each!(vreinterpretq_u8_s32(a))
    }
    #[inline(always)]
    fn shr_and_u8(self, a: Self::U8, shift: u32, mask: u8) -> Self::U8 {
        let (left, mask) = simd!((vdupq_n_s8(-(shift as i8)), vdupq_n_u8(mask)));
        quads(|i| simd!(vandq_u8(vshlq_u8(a[i], left), mask)))
    }
    #[inline(always)]
    fn shl_and_u8(self, a: Self::U8, shift: u32, mask: u8) -> Self::U8 {
        let (left, mask) = simd!((vdupq_n_s8(shift as i8), vdupq_n_u8(mask)));
        quads(|i| simd!(vandq_u8(vshlq_u8(a[i], left), mask)))
    }
    #[inline(always)]
    fn or_u8(self, a: Self::U8, b: Self::U8) -> Self::U8 {
        each!(vorrq_u8(a, b))
    }
    #[inline(always)]
    fn shl_or_u8(self, a: Self::U8, shift: u32, b: Self::U8) -> Self::U8 {
        let left = simd!(vdupq_n_s8(shift as i8));
        quads(|i| simd!(vorrq_u8(vshlq_u8(a[i], left), b[i])))
    }
    #[inline(always)]
    fn previous_u8(self, a: Self::U8) -> Self::U8 {
        let before = [simd!(vdupq_n_u8(0)), a[0], a[1], a[2]];
        each!(vextq_u8::<15>(before, a))
    }
    #[inline(always)]
    fn lookup_u8(self, a: Self::U8, table: &[u8; 16]) -> Self::U8 {
        // SAFETY: NEON as everywhere here; the array has the 16 bytes that are read.
        let table = unsafe { vld1q_u8(table.as_ptr()) };
        quads(|i| simd!(vqtbl1q_u8(table, a[i])))
    }
    #[inline(always)]
    fn narrow(self, v: [Self::I32; 4], z: i32, max: u8) -> Self::U8 {
        let (z, max) = simd!((vdupq_n_s32(z), vdupq_n_u8(max)));
        // Each step saturates: to i32, to 0…65535, to 0…255.
        let unsigned = |v| simd!(vqmovun_s32(vqaddq_s32(v, z)));
        let narrow = |a, b| simd!(vqmovn_u16(vcombine_u16(unsigned(a), unsigned(b))));
        quads(|i| simd!(vminq_u8(vcombine_u8(narrow(v[i][0], v[i][1]), narrow(v[i][2], v[i][3])), max)))
    }
    #[inline(always)]
    fn widen(self, a: Self::U8) -> [Self::I32; 4] {
        quads(|i| {
            simd!({
                let (low, high) = (vmovl_u8(vget_low_u8(a[i])), vmovl_high_u8(a[i]));
                [
                    vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(low))),
                    vreinterpretq_s32_u32(vmovl_high_u16(low)),
                    vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(high))),
                    vreinterpretq_s32_u32(vmovl_high_u16(high)),
                ]
            })
        })
    }
    #[inline(always)]
    fn pack4(self, to: &mut [u8; 32], a: Self::U8) {
        let [low, high] = [join::<4>(a[0], a[1]), join::<4>(a[2], a[3])];
        // SAFETY: NEON as everywhere here; two registers fill the 32 bytes.
        unsafe {
            vst1q_u8(to.as_mut_ptr(), low);
            vst1q_u8(to.as_mut_ptr().add(16), high);
        }
    }
    #[inline(always)]
    fn pack2(self, to: &mut [u8; 16], a: Self::U8) {
        let fields = join::<4>(join::<2>(a[0], a[1]), join::<2>(a[2], a[3]));
        // SAFETY: NEON as everywhere here; one register fills the 16 bytes.
        unsafe { vst1q_u8(to.as_mut_ptr(), fields) }
    }
    #[inline(always)]
    fn pack1(self, to: &mut [u8; 8], a: Self::U8) {
        let bytes = simd!({
            // Element `i` to its bit, then neighbours added three times: eight bits a byte, in order.
            let place = vreinterpretq_s8_u64(vdupq_n_u64(0x0706_0504_0302_0100));
            let bits = |i: usize| vshlq_u8(a[i], place);
            let fours = vpaddq_u8(vpaddq_u8(bits(0), bits(1)), vpaddq_u8(bits(2), bits(3)));
            vget_low_u8(vpaddq_u8(fours, fours))
        });
        // SAFETY: NEON as everywhere here; half a register fills the 8 bytes.
        unsafe { vst1_u8(to.as_mut_ptr(), bytes) }
    }
    #[inline(always)]
    fn unpack4(self, from: &[u8; 32]) -> Self::U8 {
        // SAFETY: NEON as everywhere here; two registers cover the 32 bytes.
        let bytes = unsafe { [vld1q_u8(from.as_ptr()), vld1q_u8(from.as_ptr().add(16))] };
        let ([a, b], [c, d]) = (part::<4>(bytes[0]), part::<4>(bytes[1]));
        [a, b, c, d]
    }
    #[inline(always)]
    fn unpack2(self, from: &[u8; 16]) -> Self::U8 {
        // SAFETY: NEON as everywhere here; one register covers the 16 bytes.
        let bytes = unsafe { vld1q_u8(from.as_ptr()) };
        let [low, high] = part::<4>(bytes);
        let ([a, b], [c, d]) = (part::<2>(low), part::<2>(high));
        [a, b, c, d]
    }
    #[inline(always)]
    fn unpack1(self, from: &[u8; 8]) -> Self::U8 {
        // SAFETY: NEON as everywhere here; half a register covers the 8 bytes.
        let bytes = unsafe { vld1_u8(from.as_ptr()) };
        simd!({
            let bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040_2010_0804_0201));
            let one = vdupq_n_u8(1);
            quads(|i| {
                // Byte 2i eight times, then byte 2i + 1 eight times.
                let source = vcombine_u8(vdup_n_u8(2 * i as u8), vdup_n_u8(2 * i as u8 + 1));
                vandq_u8(vtstq_u8(vqtbl1q_u8(vcombine_u8(bytes, bytes), source), bit), one)
            })
        })
    }
}
