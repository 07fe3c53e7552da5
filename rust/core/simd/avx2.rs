//! AVX2 with FMA and F16C: a logical vector is two ymm registers.

#![expect(unsafe_code, reason = "vendor intrinsics; the token proves that the CPU has them")]

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::{Isa, Kernel, byte_of_lanes, four};

/// Proof that the CPU has AVX2, FMA, F16C, BMI1 and BMI2.
#[derive(Debug, Clone, Copy)]
pub struct Avx2(());

impl Avx2 {
    /// The token, if the CPU has the instructions and the system saves the registers.
    pub fn detect() -> Option<Self> {
        let has = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
            && is_x86_feature_detected!("bmi1")
            && is_x86_feature_detected!("bmi2");
        has.then_some(Self(()))
    }
}

#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn trampoline<K: Kernel>(isa: Avx2, kernel: K) -> K::Output {
    kernel.run(isa)
}

/// An intrinsic on values.
macro_rules! op {
    ($call:expr) => {{
        // SAFETY: `self` is a token, so the CPU has the instruction; the operands are values.
        unsafe { $call }
    }};
}

/// An intrinsic that loads from or stores to a reference to an array.
macro_rules! mem {
    ($call:expr) => {{
        // SAFETY: `self` is a token, so the CPU has the instruction; the pointer comes from a reference to an
        // array of at least the bytes accessed, and the access is either unaligned or its alignment was checked.
        unsafe { $call }
    }};
}

const RNE: i32 = _MM_FROUND_TO_NEAREST_INT;

/// The two halves of an array in memory.
#[inline(always)]
fn halves<T, const N: usize, const H: usize>(a: &[T; N]) -> [&[T; H]; 2] {
    let (halves, _) = a.as_chunks::<H>();
    [&halves[0], &halves[1]]
}

/// The two halves of an array in memory.
#[inline(always)]
fn halves_mut<T, const N: usize, const H: usize>(a: &mut [T; N]) -> [&mut [T; H]; 2] {
    let (halves, _) = a.as_chunks_mut::<H>();
    let [first, second] = halves else { unreachable!("an array has two halves") };
    [first, second]
}

/// The same on both registers, halves in memory, or other pairs.
macro_rules! both {
    ($a:expr, |$x:ident| $value:expr) => {{
        let [first, second] = $a;
        [
            {
                let $x = first;
                $value
            },
            {
                let $x = second;
                $value
            },
        ]
    }};
}

/// An intrinsic on the registers of up to three vectors.
macro_rules! each {
    ($a:expr, |$x:ident| $call:expr) => {
        both!([0, 1], |i| {
            let $x = $a[i];
            op!($call)
        })
    };
    ($a:expr, $b:expr, |$x:ident, $y:ident| $call:expr) => {
        both!([0, 1], |i| {
            let ($x, $y) = ($a[i], $b[i]);
            op!($call)
        })
    };
    ($a:expr, $b:expr, $c:expr, |$x:ident, $y:ident, $z:ident| $call:expr) => {
        both!([0, 1], |i| {
            let ($x, $y, $z) = ($a[i], $b[i], $c[i]);
            op!($call)
        })
    };
}

impl Isa for Avx2 {
    type F32 = [__m256; 2];
    type I32 = [__m256i; 2];
    type Mask = [__m256; 2];
    type U8 = [__m256i; 2];
    /// Even lanes, odd lanes of each register.
    type Wide = [__m256i; 4];

    const NAME: &'static str = "avx2";
    const TILE_ROWS: usize = 6;
    const TILE_VECTORS: usize = 1;

    #[inline(never)]
    fn vectorize<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: `self` proves that the CPU has the features.
        unsafe { trampoline(self, kernel) }
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F32 {
        [op!(_mm256_set1_ps(value)); 2]
    }
    #[inline(always)]
    fn load(self, from: &[f32; 16]) -> Self::F32 {
        both!(halves::<_, 16, 8>(from), |half| mem!(_mm256_loadu_ps(half.as_ptr())))
    }
    #[inline(always)]
    fn load_f64(self, from: &[f64; 16]) -> Self::F32 {
        both!(halves::<_, 16, 8>(from), |half| {
            let [low, high] = halves::<_, 8, 4>(half);
            let low = mem!(_mm256_cvtpd_ps(_mm256_loadu_pd(low.as_ptr())));
            let high = mem!(_mm256_cvtpd_ps(_mm256_loadu_pd(high.as_ptr())));
            op!(_mm256_set_m128(high, low))
        })
    }
    #[inline(always)]
    fn load_bf16(self, from: &[bf16; 16]) -> Self::F32 {
        both!(halves::<_, 16, 8>(from), |half| {
            let bits = mem!(_mm256_cvtepu16_epi32(_mm_loadu_si128(half.as_ptr().cast())));
            op!(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits)))
        })
    }
    #[inline(always)]
    fn load_f16(self, from: &[f16; 16]) -> Self::F32 {
        both!(halves::<_, 16, 8>(from), |half| mem!(_mm256_cvtph_ps(_mm_loadu_si128(half.as_ptr().cast()))))
    }
    #[inline(always)]
    fn store<const STREAM: bool>(self, to: &mut [f32; 16], v: Self::F32) {
        for (to, v) in halves_mut::<_, 16, 8>(to).into_iter().zip(v) {
            let to = to.as_mut_ptr();
            if STREAM && to.addr().is_multiple_of(32) {
                mem!(_mm256_stream_ps(to, v));
            } else {
                mem!(_mm256_storeu_ps(to, v));
            }
        }
    }
    #[inline(always)]
    fn store_f64<const STREAM: bool>(self, to: &mut [f64; 16], v: Self::F32) {
        for (to, v) in halves_mut::<_, 16, 8>(to).into_iter().zip(v) {
            let quarters = op!([_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v)]);
            for (to, v) in halves_mut::<_, 8, 4>(to).into_iter().zip(quarters) {
                let to = to.as_mut_ptr();
                if STREAM && to.addr().is_multiple_of(32) {
                    mem!(_mm256_stream_pd(to, _mm256_cvtps_pd(v)));
                } else {
                    mem!(_mm256_storeu_pd(to, _mm256_cvtps_pd(v)));
                }
            }
        }
    }
    #[inline(always)]
    fn store_bf16<const STREAM: bool>(self, to: &mut [bf16; 16], v: Self::F32) {
        let bits = self.to_bits(v);
        let odd = self.and(self.shr::<16>(bits), self.splat_i32(1));
        let [low, high] = self.shr::<16>(self.add_i32(bits, self.add_i32(odd, self.splat_i32(0x7fff))));
        let packed = op!(_mm256_permute4x64_epi64::<0xd8>(_mm256_packus_epi32(low, high)));
        self.store_16(to.as_mut_ptr().cast(), packed, STREAM);
    }
    #[inline(always)]
    fn store_f16<const STREAM: bool>(self, to: &mut [f16; 16], v: Self::F32) {
        let [low, high] = each!(v, |v| _mm256_cvtps_ph::<RNE>(v));
        self.store_16(to.as_mut_ptr().cast(), op!(_mm256_set_m128i(high, low)), STREAM);
    }
    #[inline(always)]
    fn fence(self) {
        op!(_mm_sfence());
    }

    #[inline(always)]
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        each!(a, b, |a, b| _mm256_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        each!(a, b, |a, b| _mm256_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        each!(a, b, |a, b| _mm256_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        each!(a, b, |a, b| _mm256_div_ps(a, b))
    }
    #[inline(always)]
    fn mul_add(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        each!(a, b, c, |a, b, c| _mm256_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn neg_mul_add(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        each!(a, b, c, |a, b, c| _mm256_fnmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        each!(a, b, |a, b| _mm256_min_ps(a, b))
    }
    #[inline(always)]
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        each!(a, b, |a, b| _mm256_max_ps(a, b))
    }
    #[inline(always)]
    fn floor(self, a: Self::F32) -> Self::F32 {
        each!(a, |a| _mm256_floor_ps(a))
    }
    #[inline(always)]
    fn to_bits(self, a: Self::F32) -> Self::I32 {
        each!(a, |a| _mm256_castps_si256(a))
    }
    #[inline(always)]
    fn from_bits(self, a: Self::I32) -> Self::F32 {
        each!(a, |a| _mm256_castsi256_ps(a))
    }
    #[inline(always)]
    fn round(self, a: Self::F32) -> Self::I32 {
        each!(a, |a| _mm256_cvtps_epi32(a))
    }
    #[inline(always)]
    fn to_f32(self, a: Self::I32) -> Self::F32 {
        each!(a, |a| _mm256_cvtepi32_ps(a))
    }
    #[inline(always)]
    fn gt(self, a: Self::F32, b: Self::F32) -> Self::Mask {
        each!(a, b, |a, b| _mm256_cmp_ps::<_CMP_GT_OQ>(a, b))
    }
    #[inline(always)]
    fn negative(self, a: Self::F32) -> Self::Mask {
        a
    }
    #[inline(always)]
    fn select(self, mask: Self::Mask, a: Self::F32, b: Self::F32) -> Self::F32 {
        each!(mask, a, b, |mask, a, b| _mm256_blendv_ps(b, a, mask))
    }
    #[inline(always)]
    fn select_i32(self, mask: Self::Mask, a: Self::I32, b: Self::I32) -> Self::I32 {
        self.to_bits(self.select(mask, self.from_bits(a), self.from_bits(b)))
    }
    #[inline(always)]
    fn split<const H: usize>(self, a: Self::F32, b: Self::F32) -> (Self::F32, Self::F32) {
        let pair = |low: [__m256; 2], high: [__m256; 2]| (low, high);
        let across = |a: [__m256; 2]| {
            op!((_mm256_permute2f128_ps::<0x20>(a[0], a[1]), _mm256_permute2f128_ps::<0x31>(a[0], a[1])))
        };
        match H {
            8 => pair([a[0], b[0]], [a[1], b[1]]),
            4 => {
                let ((a_low, a_high), (b_low, b_high)) = (across(a), across(b));
                pair([a_low, b_low], [a_high, b_high])
            }
            2 => pair(
                each!(a, b, |a, b| _mm256_shuffle_ps::<0x44>(a, b)),
                each!(a, b, |a, b| _mm256_shuffle_ps::<0xee>(a, b)),
            ),
            _ => pair(
                each!(a, b, |a, b| _mm256_shuffle_ps::<0x88>(a, b)),
                each!(a, b, |a, b| _mm256_shuffle_ps::<0xdd>(a, b)),
            ),
        }
    }

    #[inline(always)]
    fn splat_i32(self, value: i32) -> Self::I32 {
        [op!(_mm256_set1_epi32(value)); 2]
    }
    #[inline(always)]
    fn load_i32(self, from: &[u32; 16]) -> Self::I32 {
        both!(halves::<_, 16, 8>(from), |half| mem!(_mm256_loadu_si256(half.as_ptr().cast())))
    }
    #[inline(always)]
    fn store_i32(self, to: &mut [u32; 16], v: Self::I32) {
        for (to, v) in halves_mut::<_, 16, 8>(to).into_iter().zip(v) {
            mem!(_mm256_storeu_si256(to.as_mut_ptr().cast(), v));
        }
    }
    #[inline(always)]
    fn add_i32(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        each!(a, b, |a, b| _mm256_add_epi32(a, b))
    }
    #[inline(always)]
    fn sub_i32(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        each!(a, b, |a, b| _mm256_sub_epi32(a, b))
    }
    #[inline(always)]
    fn mul_i32(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        each!(a, b, |a, b| _mm256_mullo_epi32(a, b))
    }
    #[inline(always)]
    fn and(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        each!(a, b, |a, b| _mm256_and_si256(a, b))
    }
    #[inline(always)]
    fn or(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        each!(a, b, |a, b| _mm256_or_si256(a, b))
    }
    #[inline(always)]
    fn xor(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        each!(a, b, |a, b| _mm256_xor_si256(a, b))
    }
    #[inline(always)]
    fn shl<const N: u32>(self, a: Self::I32) -> Self::I32 {
        each!(a, |a| _mm256_sll_epi32(a, _mm_cvtsi32_si128(N as i32)))
    }
    #[inline(always)]
    fn shr<const N: u32>(self, a: Self::I32) -> Self::I32 {
        each!(a, |a| _mm256_srl_epi32(a, _mm_cvtsi32_si128(N as i32)))
    }
    #[inline(always)]
    fn sar<const N: u32>(self, a: Self::I32) -> Self::I32 {
        each!(a, |a| _mm256_sra_epi32(a, _mm_cvtsi32_si128(N as i32)))
    }
    #[inline(always)]
    fn byte<const B: u32>(self, a: Self::I32) -> Self::I32 {
        let order = self.load_u8(&byte_of_lanes(B));
        each!(a, order, |a, order| _mm256_shuffle_epi8(a, order))
    }
    #[inline(always)]
    fn max_i32(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        each!(a, b, |a, b| _mm256_max_epi32(a, b))
    }
    #[inline(always)]
    fn max_u32(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        each!(a, b, |a, b| _mm256_max_epu32(a, b))
    }
    #[inline(always)]
    fn repeat_even(self, a: Self::I32) -> Self::I32 {
        each!(a, |a| _mm256_shuffle_epi32::<0xa0>(a))
    }
    #[inline(always)]
    fn prefix_sum(self, a: Self::I32) -> Self::I32 {
        let [low, high] = both!(a, |a| {
            let a = op!(_mm256_add_epi32(a, _mm256_slli_si256::<4>(a)));
            let a = op!(_mm256_add_epi32(a, _mm256_slli_si256::<8>(a)));
            // The sum of the lower four lanes, to be added to the upper four.
            let carry = op!(_mm256_shuffle_epi32::<0xff>(_mm256_permute2x128_si256::<0x08>(a, a)));
            op!(_mm256_add_epi32(a, carry))
        });
        [low, op!(_mm256_add_epi32(high, _mm256_permutevar8x32_epi32(low, _mm256_set1_epi32(7))))]
    }
    #[inline(always)]
    fn splat_last(self, a: Self::I32) -> Self::I32 {
        [op!(_mm256_permutevar8x32_epi32(a[1], _mm256_set1_epi32(7))); 2]
    }

    #[inline(always)]
    fn wide(self, a: Self::I32) -> Self::Wide {
        let odd: [__m256i; 2] = each!(a, |a| _mm256_srli_epi64::<32>(a));
        [a[0], odd[0], a[1], odd[1]]
    }
    #[inline(always)]
    fn wide_splat(self, value: u32) -> Self::Wide {
        [op!(_mm256_set1_epi32(value as i32)); 4]
    }
    #[inline(always)]
    fn wide_mul(self, a: Self::Wide, m: u32) -> Self::Wide {
        let m = op!(_mm256_set1_epi32(m as i32));
        four!(i => op!(_mm256_mul_epu32(a[i], m)))
    }
    #[inline(always)]
    fn wide_high(self, a: Self::Wide) -> Self::Wide {
        four!(i => op!(_mm256_srli_epi64::<32>(a[i])))
    }
    #[inline(always)]
    fn wide_xor3(self, a: Self::Wide, b: Self::Wide, c: Self::Wide) -> Self::Wide {
        four!(i => op!(_mm256_xor_si256(_mm256_xor_si256(a[i], b[i]), c[i])))
    }
    #[inline(always)]
    fn narrow_wide(self, a: Self::Wide) -> Self::I32 {
        both!([0, 2], |i| op!(_mm256_blend_epi32::<0xaa>(a[i], _mm256_slli_epi64::<32>(a[i + 1]))))
    }

    #[inline(always)]
    fn load_u8(self, from: &[u8; 64]) -> Self::U8 {
        both!(halves::<_, 64, 32>(from), |half| mem!(_mm256_loadu_si256(half.as_ptr().cast())))
    }
    #[inline(always)]
    fn store_u8(self, to: &mut [u8; 64], v: Self::U8) {
        for (to, v) in halves_mut::<_, 64, 32>(to).into_iter().zip(v) {
            mem!(_mm256_storeu_si256(to.as_mut_ptr().cast(), v));
        }
    }
    #[inline(always)]
    fn splat_u8(self, value: u8) -> Self::U8 {
        [op!(_mm256_set1_epi8(value as i8)); 2]
    }
    #[inline(always)]
    fn add_u8(self, a: Self::U8, b: Self::U8) -> Self::U8 {
        each!(a, b, |a, b| _mm256_add_epi8(a, b))
    }
    #[inline(always)]
    fn sub_u8(self, a: Self::U8, b: Self::U8) -> Self::U8 {
        each!(a, b, |a, b| _mm256_sub_epi8(a, b))
    }
    #[inline(always)]
    fn words(self, a: [__m256i; 2]) -> [__m256i; 2] {
        a
    }
    #[inline(always)]
    fn bytes(self, a: [__m256i; 2]) -> [__m256i; 2] {
        a
    }
    #[inline(always)]
    fn prefetch<T>(self, from: &T, ahead: usize) {
        // SAFETY: prefetching is part of every x86-64; it reads nothing and never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(std::ptr::from_ref(from).wrapping_byte_add(ahead).cast()) }
    }
    #[inline(always)]
    fn shr_and_u8(self, a: Self::U8, shift: u32, mask: u8) -> Self::U8 {
        let shifted = each!(a, |a| _mm256_srl_epi16(a, _mm_cvtsi32_si128(shift as i32)));
        self.and(shifted, self.splat_u8(mask))
    }
    #[inline(always)]
    fn shl_and_u8(self, a: Self::U8, shift: u32, mask: u8) -> Self::U8 {
        let shifted = each!(a, |a| _mm256_sll_epi16(a, _mm_cvtsi32_si128(shift as i32)));
        self.and(shifted, self.splat_u8(mask))
    }
    #[inline(always)]
    fn or_u8(self, a: Self::U8, b: Self::U8) -> Self::U8 {
        self.or(a, b)
    }
    #[inline(always)]
    fn shl_or_u8(self, a: Self::U8, shift: u32, b: Self::U8) -> Self::U8 {
        self.or(each!(a, |a| _mm256_sll_epi16(a, _mm_cvtsi32_si128(shift as i32))), b)
    }
    #[inline(always)]
    fn previous_u8(self, a: Self::U8) -> Self::U8 {
        let [low, high] = a;
        // The 16 bytes before each half of a register.
        let before_low = op!(_mm256_permute2x128_si256::<0x08>(low, low));
        let before_high = op!(_mm256_permute2x128_si256::<0x21>(low, high));
        op!([_mm256_alignr_epi8::<15>(low, before_low), _mm256_alignr_epi8::<15>(high, before_high)])
    }
    #[inline(always)]
    fn lookup_u8(self, a: Self::U8, table: &[u8; 16]) -> Self::U8 {
        let table = mem!(_mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast())));
        each!(a, |a| _mm256_shuffle_epi8(table, a))
    }
    #[inline(always)]
    fn narrow(self, v: [Self::I32; 4], z: i32, max: u8) -> Self::U8 {
        let z = op!(_mm256_set1_epi16(z as i16));
        let order = op!(_mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        let words = four!(j => op!(_mm256_adds_epi16(_mm256_packs_epi32(v[j][0], v[j][1]), z)));
        both!([0, 1], |i| {
            let bytes = op!(_mm256_packus_epi16(words[2 * i], words[2 * i + 1]));
            let bytes = op!(_mm256_permutevar8x32_epi32(bytes, order));
            op!(_mm256_min_epu8(bytes, _mm256_set1_epi8(max as i8)))
        })
    }
    #[inline(always)]
    fn widen(self, a: Self::U8) -> [Self::I32; 4] {
        four!(j => {
            let half: __m256i = a[j / 2];
            let quarter = if j % 2 == 0 {
                op!(_mm256_castsi256_si128(half))
            } else {
                op!(_mm256_extracti128_si256::<1>(half))
            };
            op!([_mm256_cvtepu8_epi32(quarter), _mm256_cvtepu8_epi32(_mm_srli_si128::<8>(quarter))])
        })
    }
    #[inline(always)]
    fn pack4(self, to: &mut [u8; 32], a: Self::U8) {
        let [low, high] = each!(a, |a| _mm256_maddubs_epi16(a, _mm256_set1_epi16(0x1001)));
        let packed = op!(_mm256_permute4x64_epi64::<0xd8>(_mm256_packus_epi16(low, high)));
        mem!(_mm256_storeu_si256(to.as_mut_ptr().cast(), packed));
    }
    #[inline(always)]
    fn pack2(self, to: &mut [u8; 16], a: Self::U8) {
        let pairs: [__m256i; 2] = each!(a, |a| _mm256_maddubs_epi16(a, _mm256_set1_epi16(0x0401)));
        let [low, high] = each!(pairs, |pairs| _mm256_madd_epi16(pairs, _mm256_set1_epi32(0x0010_0001)));
        let words = op!(_mm256_permute4x64_epi64::<0xd8>(_mm256_packus_epi32(low, high)));
        let bytes =
            op!(_mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words)));
        mem!(_mm_storeu_si128(to.as_mut_ptr().cast(), bytes));
    }
    #[inline(always)]
    fn pack1(self, to: &mut [u8; 8], a: Self::U8) {
        let [low, high] = each!(a, |a| _mm256_movemask_epi8(_mm256_slli_epi16::<7>(a)) as u32);
        *to = (u64::from(high) << 32 | u64::from(low)).to_le_bytes();
    }
    #[inline(always)]
    fn unpack4(self, from: &[u8; 32]) -> Self::U8 {
        let x = both!(halves::<_, 32, 16>(from), |half| mem!(_mm256_cvtepu8_epi16(_mm_loadu_si128(
            half.as_ptr().cast()
        ))));
        self.and(self.or(x, each!(x, |x| _mm256_slli_epi16::<4>(x))), self.splat_u8(15))
    }
    #[inline(always)]
    fn unpack2(self, from: &[u8; 16]) -> Self::U8 {
        let x = both!(halves::<_, 16, 8>(from), |half| mem!(_mm256_cvtepu8_epi32(_mm_loadl_epi64(
            half.as_ptr().cast()
        ))));
        let spread = self.or(self.or(x, self.shl::<6>(x)), self.or(self.shl::<12>(x), self.shl::<18>(x)));
        self.and(spread, self.splat_u8(3))
    }
    #[inline(always)]
    fn unpack1(self, from: &[u8; 8]) -> Self::U8 {
        let byte_of_bit = op!(_mm256_setr_epi8(
            0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3
        ));
        let bit = op!(_mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64));
        both!(halves::<_, 8, 4>(from), |half| {
            let bytes = op!(_mm256_shuffle_epi8(_mm256_set1_epi32(i32::from_le_bytes(*half)), byte_of_bit));
            let set = op!(_mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit));
            op!(_mm256_and_si256(set, _mm256_set1_epi8(1)))
        })
    }
}

impl Avx2 {
    /// Stores 16 elements of 16 bits.
    #[inline(always)]
    fn store_16(self, to: *mut __m256i, v: __m256i, stream: bool) {
        if stream && to.addr().is_multiple_of(32) {
            mem!(_mm256_stream_si256(to, v));
        } else {
            mem!(_mm256_storeu_si256(to, v));
        }
    }
}
