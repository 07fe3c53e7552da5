//! The portable instruction set: arrays, which the compiler vectorizes for its baseline.

use half::{bf16, f16};

use super::{Isa, Kernel, array, four};

/// Needs nothing of the CPU.
#[derive(Debug, Clone, Copy)]
pub struct Scalar;

#[inline(always)]
fn map<T: Copy, U: Copy + Default, const N: usize>(a: [T; N], f: impl Fn(T) -> U) -> [U; N] {
    array(|i| f(a[i]))
}

#[inline(always)]
fn zip<T: Copy, S: Copy, U: Copy + Default, const N: usize>(
    a: [T; N],
    b: [S; N],
    f: impl Fn(T, S) -> U,
) -> [U; N] {
    array(|i| f(a[i], b[i]))
}

/// Packs `8 / W` fields a byte.
#[inline(always)]
fn pack<const W: usize>(to: &mut [u8], a: [u8; 64]) {
    let fields = 8 / W;
    for (i, byte) in to.iter_mut().enumerate() {
        *byte = (0..fields).fold(0, |byte, j| byte | a[i * fields + j] << (j * W));
    }
}

#[inline(always)]
fn unpack<const W: usize>(from: &[u8]) -> [u8; 64] {
    let fields = 8 / W;
    array(|i| from[i / fields] >> (i % fields * W) & ((1 << W) - 1))
}

impl Isa for Scalar {
    type F32 = [f32; 16];
    type I32 = [i32; 16];
    type Mask = [bool; 16];
    type U8 = [u8; 64];
    type Wide = [u64; 16];

    const NAME: &'static str = "scalar";
    const TILE_ROWS: usize = 2;
    const TILE_VECTORS: usize = 1;

    #[inline(never)]
    fn vectorize<K: Kernel>(self, kernel: K) -> K::Output {
        kernel.run(self)
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F32 {
        [value; 16]
    }
    #[inline(always)]
    fn load(self, from: &[f32; 16]) -> Self::F32 {
        *from
    }
    #[inline(always)]
    fn load_f64(self, from: &[f64; 16]) -> Self::F32 {
        map(*from, |x| x as f32)
    }
    #[inline(always)]
    fn load_bf16(self, from: &[bf16; 16]) -> Self::F32 {
        map(*from, bf16::to_f32)
    }
    #[inline(always)]
    fn load_f16(self, from: &[f16; 16]) -> Self::F32 {
        map(*from, f16::to_f32)
    }
    #[inline(always)]
    fn store<const STREAM: bool>(self, to: &mut [f32; 16], v: Self::F32) {
        *to = v;
    }
    #[inline(always)]
    fn store_f64<const STREAM: bool>(self, to: &mut [f64; 16], v: Self::F32) {
        *to = map(v, f64::from);
    }
    #[inline(always)]
    fn store_bf16<const STREAM: bool>(self, to: &mut [bf16; 16], v: Self::F32) {
        *to = map(v, bf16::from_f32);
    }
    #[inline(always)]
    fn store_f16<const STREAM: bool>(self, to: &mut [f16; 16], v: Self::F32) {
        *to = map(v, f16::from_f32);
    }
    #[inline(always)]
    fn fence(self) {}

    #[inline(always)]
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn mul_add(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        array(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    fn neg_mul_add(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        array(|i| (-a[i]).mul_add(b[i], c[i]))
    }
    #[inline(always)]
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn floor(self, a: Self::F32) -> Self::F32 {
        map(a, f32::floor)
    }
    #[inline(always)]
    fn to_bits(self, a: Self::F32) -> Self::I32 {
        map(a, |x| x.to_bits() as i32)
    }
    #[inline(always)]
    fn from_bits(self, a: Self::I32) -> Self::F32 {
        map(a, |x| f32::from_bits(x as u32))
    }
    #[inline(always)]
    fn round(self, a: Self::F32) -> Self::I32 {
        map(a, |x| x.round_ties_even() as i32)
    }
    #[inline(always)]
    fn to_f32(self, a: Self::I32) -> Self::F32 {
        map(a, |x| x as f32)
    }
    #[inline(always)]
    fn gt(self, a: Self::F32, b: Self::F32) -> Self::Mask {
        zip(a, b, |a, b| a > b)
    }
    #[inline(always)]
    fn negative(self, a: Self::F32) -> Self::Mask {
        map(a, f32::is_sign_negative)
    }
    #[inline(always)]
    fn select(self, mask: Self::Mask, a: Self::F32, b: Self::F32) -> Self::F32 {
        array(|i| if mask[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn select_i32(self, mask: Self::Mask, a: Self::I32, b: Self::I32) -> Self::I32 {
        array(|i| if mask[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn split<const H: usize>(self, a: Self::F32, b: Self::F32) -> (Self::F32, Self::F32) {
        // Where lane `i` of the first result comes from, counted over a (0…15) and b (16…31).
        let source = |i: usize| match H {
            8 => i + i / 8 * 8,
            4 => i + i / 4 * 4,
            2 => i / 4 * 4 + i % 2 + i % 4 / 2 * 16,
            _ => i / 4 * 4 + i % 2 * 2 + i % 4 / 2 * 16,
        };
        let pick = |i: usize| if i < 16 { a[i] } else { b[i - 16] };
        (array(|i| pick(source(i))), array(|i| pick(source(i) + H)))
    }

    #[inline(always)]
    fn splat_i32(self, value: i32) -> Self::I32 {
        [value; 16]
    }
    #[inline(always)]
    fn load_i32(self, from: &[u32; 16]) -> Self::I32 {
        map(*from, |x| x as i32)
    }
    #[inline(always)]
    fn store_i32(self, to: &mut [u32; 16], v: Self::I32) {
        *to = map(v, |x| x as u32);
    }
    #[inline(always)]
    fn add_i32(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        zip(a, b, i32::wrapping_add)
    }
    #[inline(always)]
    fn sub_i32(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        zip(a, b, i32::wrapping_sub)
    }
    #[inline(always)]
    fn mul_i32(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        zip(a, b, i32::wrapping_mul)
    }
    #[inline(always)]
    fn and(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        zip(a, b, |a, b| a & b)
    }
    #[inline(always)]
    fn or(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        zip(a, b, |a, b| a | b)
    }
    #[inline(always)]
    fn xor(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        zip(a, b, |a, b| a ^ b)
    }
    #[inline(always)]
    fn shl<const N: u32>(self, a: Self::I32) -> Self::I32 {
        map(a, |x| x << N)
    }
    #[inline(always)]
    fn shr<const N: u32>(self, a: Self::I32) -> Self::I32 {
        map(a, |x| (x as u32 >> N) as i32)
    }
    #[inline(always)]
    fn sar<const N: u32>(self, a: Self::I32) -> Self::I32 {
        map(a, |x| x >> N)
    }
    #[inline(always)]
    fn max_i32(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        zip(a, b, i32::max)
    }
    #[inline(always)]
    fn max_u32(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        zip(a, b, |a, b| (a as u32).max(b as u32) as i32)
    }
    #[inline(always)]
    fn repeat_even(self, a: Self::I32) -> Self::I32 {
        array(|i| a[i & !1])
    }

    #[inline(always)]
    fn wide(self, a: Self::I32) -> Self::Wide {
        map(a, |x| u64::from(x as u32))
    }
    #[inline(always)]
    fn wide_splat(self, value: u32) -> Self::Wide {
        [u64::from(value); 16]
    }
    #[inline(always)]
    fn wide_mul(self, a: Self::Wide, m: u32) -> Self::Wide {
        map(a, |x| (x & 0xffff_ffff) * u64::from(m))
    }
    #[inline(always)]
    fn wide_high(self, a: Self::Wide) -> Self::Wide {
        map(a, |x| x >> 32)
    }
    #[inline(always)]
    fn wide_xor3(self, a: Self::Wide, b: Self::Wide, c: Self::Wide) -> Self::Wide {
        array(|i| a[i] ^ b[i] ^ c[i])
    }
    #[inline(always)]
    fn narrow_wide(self, a: Self::Wide) -> Self::I32 {
        map(a, |x| x as i32)
    }

    #[inline(always)]
    fn load_u8(self, from: &[u8; 64]) -> Self::U8 {
        *from
    }
    #[inline(always)]
    fn store_u8(self, to: &mut [u8; 64], v: Self::U8) {
        *to = v;
    }
    #[inline(always)]
    fn splat_u8(self, value: u8) -> Self::U8 {
        [value; 64]
    }
    #[inline(always)]
    fn add_u8(self, a: Self::U8, b: Self::U8) -> Self::U8 {
        zip(a, b, u8::wrapping_add)
    }
    #[inline(always)]
    fn sub_u8(self, a: Self::U8, b: Self::U8) -> Self::U8 {
        zip(a, b, u8::wrapping_sub)
    }
    #[inline(always)]
    fn words(self, a: [u8; 64]) -> [i32; 16] {
        array(|i| i32::from_le_bytes(std::array::from_fn(|j| a[4 * i + j])))
    }
    #[inline(always)]
    fn bytes(self, a: [i32; 16]) -> [u8; 64] {
        array(|i| a[i / 4].to_le_bytes()[i % 4])
    }
    #[inline(always)]
    fn shr_and_u8(self, a: Self::U8, shift: u32, mask: u8) -> Self::U8 {
        map(a, |x| x >> shift & mask)
    }
    #[inline(always)]
    fn shl_and_u8(self, a: Self::U8, shift: u32, mask: u8) -> Self::U8 {
        map(a, |x| x << shift & mask)
    }
    #[inline(always)]
    fn or_u8(self, a: Self::U8, b: Self::U8) -> Self::U8 {
        zip(a, b, |a, b| a | b)
    }
    #[inline(always)]
    fn shl_or_u8(self, a: Self::U8, shift: u32, b: Self::U8) -> Self::U8 {
        zip(a, b, |a, b| a << shift | b)
    }
    #[inline(always)]
    fn previous_u8(self, a: Self::U8) -> Self::U8 {
        array(|i| if i == 0 { 0 } else { a[i - 1] })
    }
    #[inline(always)]
    fn lookup_u8(self, a: Self::U8, table: &[u8; 16]) -> Self::U8 {
        map(a, |x| table[usize::from(x & 15)])
    }
    #[inline(always)]
    fn narrow(self, v: [Self::I32; 4], z: i32, max: u8) -> Self::U8 {
        array(|i| v[i / 16][i % 16].saturating_add(z).clamp(0, i32::from(max)) as u8)
    }
    #[inline(always)]
    fn widen(self, a: Self::U8) -> [Self::I32; 4] {
        four!(j => array(|i| i32::from(a[16 * j + i])))
    }
    #[inline(always)]
    fn pack4(self, to: &mut [u8; 32], a: Self::U8) {
        pack::<4>(to, a);
    }
    #[inline(always)]
    fn pack2(self, to: &mut [u8; 16], a: Self::U8) {
        pack::<2>(to, a);
    }
    #[inline(always)]
    fn pack1(self, to: &mut [u8; 8], a: Self::U8) {
        pack::<1>(to, a);
    }
    #[inline(always)]
    fn unpack4(self, from: &[u8; 32]) -> Self::U8 {
        unpack::<4>(from)
    }
    #[inline(always)]
    fn unpack2(self, from: &[u8; 16]) -> Self::U8 {
        unpack::<2>(from)
    }
    #[inline(always)]
    fn unpack1(self, from: &[u8; 8]) -> Self::U8 {
        unpack::<1>(from)
    }
}
