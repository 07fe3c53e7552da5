//! AVX-512 as of Ice Lake and Zen 4: a logical vector is one zmm register.

#![expect(unsafe_code, reason = "vendor intrinsics; the token proves that the CPU has them")]

use std::arch::asm;
use std::arch::x86_64::*;

use half::{bf16, f16};

use super::{Isa, Kernel, array, byte_of_lanes};

/// Proof that the CPU has AVX-512 F, BW, DQ, VL and VBMI.
#[derive(Debug, Clone, Copy)]
pub struct Avx512(());

impl Avx512 {
    /// The token, if the CPU has the instructions and the system saves the registers.
    pub fn detect() -> Option<Self> {
        let has = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vbmi")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
            && is_x86_feature_detected!("bmi2");
        has.then_some(Self(()))
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx2,fma,f16c,bmi2")]
fn trampoline<K: Kernel>(isa: Avx512, kernel: K) -> K::Output {
    kernel.run(isa)
}

/// `_mm512_permutex2var_epi8`, opaque: the compiler would make it four other shuffles.
#[inline]
#[target_feature(enable = "avx512vbmi")]
fn permutex2var_epi8(mut a: __m512i, order: __m512i, b: __m512i) -> __m512i {
    // SAFETY: the instruction is of AVX-512 VBMI and touches nothing but its operands.
    unsafe {
        asm!("vpermt2b {}, {}, {}", inout(zmm_reg) a, in(zmm_reg) order, in(zmm_reg) b,
            options(pure, nomem, nostack, preserves_flags));
    }
    a
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
        // array of exactly the bytes accessed, and the access is either unaligned or its alignment was checked.
        unsafe { $call }
    }};
}

const RNE: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

impl Isa for Avx512 {
    type F32 = __m512;
    type I32 = __m512i;
    type Mask = __mmask16;
    type U8 = __m512i;
    /// Even lanes, odd lanes.
    type Wide = [__m512i; 2];

    const NAME: &'static str = "avx512";
    const TILE_ROWS: usize = 6;
    const TILE_VECTORS: usize = 4;
    const TWO_TILES: bool = true;

    #[inline(never)]
    fn vectorize<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: `self` proves that the CPU has the features.
        unsafe { trampoline(self, kernel) }
    }

    #[inline(always)]
    fn splat(self, value: f32) -> __m512 {
        op!(_mm512_set1_ps(value))
    }
    #[inline(always)]
    fn load(self, from: &[f32; 16]) -> __m512 {
        mem!(_mm512_loadu_ps(from.as_ptr()))
    }
    #[inline(always)]
    fn load_f64(self, from: &[f64; 16]) -> __m512 {
        let low = mem!(_mm512_cvtpd_ps(_mm512_loadu_pd(from.as_ptr())));
        let high = mem!(_mm512_cvtpd_ps(_mm512_loadu_pd(from[8..].as_ptr())));
        op!(_mm512_insertf32x8::<1>(_mm512_castps256_ps512(low), high))
    }
    #[inline(always)]
    fn load_bf16(self, from: &[bf16; 16]) -> __m512 {
        let bits = mem!(_mm256_loadu_si256(from.as_ptr().cast()));
        op!(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits))))
    }
    #[inline(always)]
    fn load_f16(self, from: &[f16; 16]) -> __m512 {
        mem!(_mm512_cvtph_ps(_mm256_loadu_si256(from.as_ptr().cast())))
    }
    #[inline(always)]
    fn store<const STREAM: bool>(self, to: &mut [f32; 16], v: __m512) {
        let to = to.as_mut_ptr();
        if STREAM && to.addr().is_multiple_of(64) {
            mem!(_mm512_stream_ps(to, v));
        } else {
            mem!(_mm512_storeu_ps(to, v));
        }
    }
    #[inline(always)]
    fn store_f64<const STREAM: bool>(self, to: &mut [f64; 16], v: __m512) {
        let low = op!(_mm512_cvtps_pd(_mm512_castps512_ps256(v)));
        let high = op!(_mm512_cvtps_pd(_mm512_extractf32x8_ps::<1>(v)));
        let (first, second) = to.split_at_mut(8);
        let (first, second) = (first.as_mut_ptr(), second.as_mut_ptr());
        if STREAM && first.addr().is_multiple_of(64) {
            mem!(_mm512_stream_pd(first, low));
            mem!(_mm512_stream_pd(second, high));
        } else {
            mem!(_mm512_storeu_pd(first, low));
            mem!(_mm512_storeu_pd(second, high));
        }
    }
    #[inline(always)]
    fn store_bf16<const STREAM: bool>(self, to: &mut [bf16; 16], v: __m512) {
        let bits = self.to_bits(v);
        let odd = self.and(self.shr::<16>(bits), self.splat_i32(1));
        let rounded = self.shr::<16>(self.add_i32(bits, self.add_i32(odd, self.splat_i32(0x7fff))));
        let to = to.as_mut_ptr().cast::<__m256i>();
        let half = op!(_mm512_cvtepi32_epi16(rounded));
        if STREAM && to.addr().is_multiple_of(32) {
            mem!(_mm256_stream_si256(to, half));
        } else {
            mem!(_mm256_storeu_si256(to, half));
        }
    }
    #[inline(always)]
    fn store_f16<const STREAM: bool>(self, to: &mut [f16; 16], v: __m512) {
        let to = to.as_mut_ptr().cast::<__m256i>();
        let half = op!(_mm512_cvtps_ph::<RNE>(v));
        if STREAM && to.addr().is_multiple_of(32) {
            mem!(_mm256_stream_si256(to, half));
        } else {
            mem!(_mm256_storeu_si256(to, half));
        }
    }
    #[inline(always)]
    fn fence(self) {
        op!(_mm_sfence());
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_div_ps(a, b))
    }
    #[inline(always)]
    fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        op!(_mm512_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn neg_mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        op!(_mm512_fnmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_min_ps(a, b))
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_max_ps(a, b))
    }
    #[inline(always)]
    fn floor(self, a: __m512) -> __m512 {
        op!(_mm512_roundscale_ps::<{ _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC }>(a))
    }
    #[inline(always)]
    fn negative_to_256ths(self, a: __m512) -> __m512 {
        op!(_mm512_roundscale_ps::<{ 8 << 4 | RNE }>(a))
    }
    #[inline(always)]
    fn to_bits(self, a: __m512) -> __m512i {
        op!(_mm512_castps_si512(a))
    }
    #[inline(always)]
    fn from_bits(self, a: __m512i) -> __m512 {
        op!(_mm512_castsi512_ps(a))
    }
    #[inline(always)]
    fn round(self, a: __m512) -> __m512i {
        op!(_mm512_cvtps_epi32(a))
    }
    #[inline(always)]
    fn to_f32(self, a: __m512i) -> __m512 {
        op!(_mm512_cvtepi32_ps(a))
    }
    #[inline(always)]
    fn nibble_to_f32<const B: u32>(self, a: __m512i) -> __m512 {
        // The lookup goes by the lowest four bits.
        let numbers = self.load(&array(|i| i as f32));
        match B {
            0 => op!(_mm512_permutexvar_ps(a, numbers)),
            1 => op!(_mm512_permutexvar_ps(self.shr::<8>(a), numbers)),
            2 => op!(_mm512_permutexvar_ps(self.shr::<16>(a), numbers)),
            _ => op!(_mm512_permutexvar_ps(self.shr::<24>(a), numbers)),
        }
    }
    #[inline(always)]
    fn gt(self, a: __m512, b: __m512) -> __mmask16 {
        op!(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b))
    }
    #[inline(always)]
    fn negative(self, a: __m512) -> __mmask16 {
        op!(_mm512_movepi32_mask(_mm512_castps_si512(a)))
    }
    #[inline(always)]
    fn select(self, mask: __mmask16, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_mask_blend_ps(mask, b, a))
    }
    #[inline(always)]
    fn select_i32(self, mask: __mmask16, a: __m512i, b: __m512i) -> __m512i {
        op!(_mm512_mask_blend_epi32(mask, b, a))
    }
    #[inline(always)]
    fn split<const H: usize>(self, a: __m512, b: __m512) -> (__m512, __m512) {
        match H {
            8 => op!((_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xee>(a, b))),
            4 => op!((_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b))),
            2 => op!((_mm512_shuffle_ps::<0x44>(a, b), _mm512_shuffle_ps::<0xee>(a, b))),
            _ => op!((_mm512_shuffle_ps::<0x88>(a, b), _mm512_shuffle_ps::<0xdd>(a, b))),
        }
    }

    #[inline(always)]
    fn splat_i32(self, value: i32) -> __m512i {
        op!(_mm512_set1_epi32(value))
    }
    #[inline(always)]
    fn load_i32(self, from: &[u32; 16]) -> __m512i {
        mem!(_mm512_loadu_si512(from.as_ptr().cast()))
    }
    #[inline(always)]
    fn store_i32(self, to: &mut [u32; 16], v: __m512i) {
        mem!(_mm512_storeu_si512(to.as_mut_ptr().cast(), v));
    }
    #[inline(always)]
    fn add_i32(self, a: __m512i, b: __m512i) -> __m512i {
        op!(_mm512_add_epi32(a, b))
    }
    #[inline(always)]
    fn sub_i32(self, a: __m512i, b: __m512i) -> __m512i {
        op!(_mm512_sub_epi32(a, b))
    }
    #[inline(always)]
    fn mul_i32(self, a: __m512i, b: __m512i) -> __m512i {
        op!(_mm512_mullo_epi32(a, b))
    }
    #[inline(always)]
    fn and(self, a: __m512i, b: __m512i) -> __m512i {
        op!(_mm512_and_si512(a, b))
    }
    #[inline(always)]
    fn or(self, a: __m512i, b: __m512i) -> __m512i {
        op!(_mm512_or_si512(a, b))
    }
    #[inline(always)]
    fn xor(self, a: __m512i, b: __m512i) -> __m512i {
        op!(_mm512_xor_si512(a, b))
    }
    #[inline(always)]
    fn shl<const N: u32>(self, a: __m512i) -> __m512i {
        op!(_mm512_slli_epi32::<N>(a))
    }
    #[inline(always)]
    fn shr<const N: u32>(self, a: __m512i) -> __m512i {
        op!(_mm512_srli_epi32::<N>(a))
    }
    #[inline(always)]
    fn sar<const N: u32>(self, a: __m512i) -> __m512i {
        op!(_mm512_srai_epi32::<N>(a))
    }
    #[inline(always)]
    fn byte<const B: u32>(self, a: __m512i) -> __m512i {
        op!(_mm512_shuffle_epi8(a, self.load_u8(&byte_of_lanes(B))))
    }
    #[inline(always)]
    fn max_i32(self, a: __m512i, b: __m512i) -> __m512i {
        op!(_mm512_max_epi32(a, b))
    }
    #[inline(always)]
    fn max_u32(self, a: __m512i, b: __m512i) -> __m512i {
        op!(_mm512_max_epu32(a, b))
    }
    #[inline(always)]
    fn repeat_even(self, a: __m512i) -> __m512i {
        op!(_mm512_shuffle_epi32::<0xa0>(a))
    }
    #[inline(always)]
    fn any_low_half_below_4(self, v: [__m512i; 4]) -> bool {
        let low = op!(_mm512_min_epu16(v[0], v[1]));
        let high = op!(_mm512_min_epu16(v[2], v[3]));
        op!(_mm512_testn_epi32_mask(_mm512_min_epu16(low, high), _mm512_set1_epi32(0xfffc))) != 0
    }

    /// Lane 4·b + j gets the run of elements 16·j + 4·b and the three after it, which are added up first, so that one
    /// prefix sum over lanes serves all 64. In that sum b counts faster than j.
    #[inline(always)]
    fn high_byte_steps(self, v: [__m512i; 4], start: i32) -> __m512i {
        let (low01, high01) = op!((_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1])));
        let (low23, high23) = op!((_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3])));
        let (a0, a1) = op!((_mm512_unpacklo_epi64(low01, low23), _mm512_unpackhi_epi64(low01, low23)));
        let (a2, a3) = op!((_mm512_unpacklo_epi64(high01, high23), _mm512_unpackhi_epi64(high01, high23)));
        let (a1, a23) = (self.add_i32(a0, a1), self.add_i32(a2, a3));
        let (a2, a3) = (self.add_i32(a1, a2), self.add_i32(a1, a23));

        let runs = self.add_i32(a3, op!(_mm512_maskz_shuffle_i32x4::<0x90>(0xfff0, a3, a3)));
        let runs = self.add_i32(runs, op!(_mm512_maskz_shuffle_i32x4::<0x40>(0xff00, runs, runs)));
        let vectors = op!(_mm512_shuffle_i32x4::<0xff>(runs, runs));
        let vectors = op!(_mm512_maskz_shuffle_epi32::<0x90>(0xeeee, vectors));
        let vectors = self.add_i32(vectors, op!(_mm512_maskz_shuffle_epi32::<0x90>(0xeeee, vectors)));
        let vectors = self.add_i32(vectors, op!(_mm512_maskz_shuffle_epi32::<0x40>(0xcccc, vectors)));

        let before = self.add_i32(self.sub_i32(self.splat_i32(start), a3), self.add_i32(runs, vectors));
        let sum = |a| self.add_i32(a, before);
        // The high bytes, in order; those of a0 and a1 and those of a2 and a3 where they belong.
        let order = self.load_u8(&array(|i| (i % 16 / 4 * 16 + i / 16 * 4 + 3 + i % 2 * 64) as u8));
        let low = op!(permutex2var_epi8(sum(a0), order, sum(a1)));
        let high = op!(permutex2var_epi8(sum(a2), order, sum(a3)));
        let high = op!(_mm512_mask_blend_epi16(0xaaaa_aaaa, low, high));
        self.sub_u8(high, self.previous_u8(high))
    }

    #[inline(always)]
    fn wide(self, a: __m512i) -> [__m512i; 2] {
        [a, op!(_mm512_srli_epi64::<32>(a))]
    }
    #[inline(always)]
    fn wide_splat(self, value: u32) -> [__m512i; 2] {
        [op!(_mm512_set1_epi32(value as i32)); 2]
    }
    #[inline(always)]
    fn wide_mul(self, a: [__m512i; 2], m: u32) -> [__m512i; 2] {
        let m = self.splat_i32(m as i32);
        op!([_mm512_mul_epu32(a[0], m), _mm512_mul_epu32(a[1], m)])
    }
    #[inline(always)]
    fn wide_high(self, a: [__m512i; 2]) -> [__m512i; 2] {
        op!([_mm512_srli_epi64::<32>(a[0]), _mm512_srli_epi64::<32>(a[1])])
    }
    #[inline(always)]
    fn wide_xor3(self, a: [__m512i; 2], b: [__m512i; 2], c: [__m512i; 2]) -> [__m512i; 2] {
        op!([
            _mm512_ternarylogic_epi64::<0x96>(a[0], b[0], c[0]),
            _mm512_ternarylogic_epi64::<0x96>(a[1], b[1], c[1]),
        ])
    }
    #[inline(always)]
    fn narrow_wide(self, a: [__m512i; 2]) -> __m512i {
        // A shuffle: the compiler would turn a shift of a product into a slow 64-bit multiplication.
        op!(_mm512_mask_shuffle_epi32::<0xa0>(a[0], 0xaaaa, a[1]))
    }
    #[inline(always)]
    fn narrow_wide_high(self, a: [__m512i; 2]) -> __m512i {
        op!(_mm512_mask_shuffle_epi32::<0xf5>(a[1], 0x5555, a[0]))
    }

    #[inline(always)]
    fn load_u8(self, from: &[u8; 64]) -> __m512i {
        mem!(_mm512_loadu_si512(from.as_ptr().cast()))
    }
    #[inline(always)]
    fn store_u8(self, to: &mut [u8; 64], v: __m512i) {
        mem!(_mm512_storeu_si512(to.as_mut_ptr().cast(), v));
    }
    #[inline(always)]
    fn splat_u8(self, value: u8) -> __m512i {
        op!(_mm512_set1_epi8(value as i8))
    }
    #[inline(always)]
    fn add_u8(self, a: __m512i, b: __m512i) -> __m512i {
        op!(_mm512_add_epi8(a, b))
    }
    #[inline(always)]
    fn sub_u8(self, a: __m512i, b: __m512i) -> __m512i {
        op!(_mm512_sub_epi8(a, b))
    }
    #[inline(always)]
    fn words(self, a: __m512i) -> __m512i {
        a
    }
    #[inline(always)]
    fn bytes(self, a: __m512i) -> __m512i {
        a
    }
    #[inline(always)]
    fn prefetch<T>(self, from: &T, ahead: usize) {
        // SAFETY: prefetching is part of every x86-64; it reads nothing and never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(std::ptr::from_ref(from).wrapping_byte_add(ahead).cast()) }
    }
    #[inline(always)]
    fn shr_and_u8(self, a: __m512i, shift: u32, mask: u8) -> __m512i {
        let shifted = op!(_mm512_srl_epi16(a, _mm_cvtsi32_si128(shift as i32)));
        self.and(shifted, self.splat_u8(mask))
    }
    #[inline(always)]
    fn shl_and_u8(self, a: __m512i, shift: u32, mask: u8) -> __m512i {
        let shifted = op!(_mm512_sll_epi16(a, _mm_cvtsi32_si128(shift as i32)));
        self.and(shifted, self.splat_u8(mask))
    }
    #[inline(always)]
    fn or_u8(self, a: __m512i, b: __m512i) -> __m512i {
        self.or(a, b)
    }
    #[inline(always)]
    fn shl_or_u8(self, a: __m512i, shift: u32, b: __m512i) -> __m512i {
        self.or(op!(_mm512_sll_epi16(a, _mm_cvtsi32_si128(shift as i32))), b)
    }
    #[inline(always)]
    fn previous_u8(self, a: __m512i) -> __m512i {
        let before = self.load_u8(&array(|i| (i as u8).wrapping_sub(1)));
        op!(_mm512_maskz_permutexvar_epi8(!1, before, a))
    }
    #[inline(always)]
    fn lookup_u8(self, a: __m512i, table: &[u8; 16]) -> __m512i {
        let table = mem!(_mm_loadu_si128(table.as_ptr().cast()));
        op!(_mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), a))
    }
    #[inline(always)]
    fn narrow(self, v: [__m512i; 4], z: i32, max: u8) -> __m512i {
        // Quarter q of the packed bytes holds the quarters q of v[0] to v[3]; the permutation transposes that.
        let order = self.load_i32(&array(|i| (i % 4 * 4 + i / 4) as u32));
        let z = op!(_mm512_set1_epi16(z as i16));
        let low = op!(_mm512_adds_epi16(_mm512_packs_epi32(v[0], v[1]), z));
        let high = op!(_mm512_adds_epi16(_mm512_packs_epi32(v[2], v[3]), z));
        let bytes = op!(_mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high)));
        op!(_mm512_min_epu8(bytes, _mm512_set1_epi8(max as i8)))
    }
    #[inline(always)]
    fn narrow_high(self, v: [__m512i; 4], z: i32) -> __m512i {
        // The third bytes of two vectors, in either half of the result.
        let third = self.load_u8(&array(|i| (i % 32 * 4 + 2) as u8));
        let low = op!(permutex2var_epi8(v[0], third, v[1]));
        let high = op!(permutex2var_epi8(v[2], third, v[3]));
        let bytes = op!(_mm512_mask_blend_epi64(0xf0, low, high));
        self.add_u8(bytes, self.splat_u8(z as u8))
    }
    #[inline(always)]
    fn widen(self, a: __m512i) -> [__m512i; 4] {
        op!([
            _mm512_cvtepu8_epi32(_mm512_castsi512_si128(a)),
            _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32::<1>(a)),
            _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32::<2>(a)),
            _mm512_cvtepu8_epi32(_mm512_extracti32x4_epi32::<3>(a)),
        ])
    }
    #[inline(always)]
    fn pack4(self, to: &mut [u8; 32], a: __m512i) {
        let pairs = op!(_mm512_maddubs_epi16(a, _mm512_set1_epi16(0x1001)));
        mem!(_mm256_storeu_si256(to.as_mut_ptr().cast(), _mm512_cvtepi16_epi8(pairs)));
    }
    #[inline(always)]
    fn pack2(self, to: &mut [u8; 16], a: __m512i) {
        let pairs = op!(_mm512_maddubs_epi16(a, _mm512_set1_epi16(0x0401)));
        let fours = op!(_mm512_madd_epi16(pairs, _mm512_set1_epi32(0x0010_0001)));
        mem!(_mm_storeu_si128(to.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(fours)));
    }
    #[inline(always)]
    fn pack1(self, to: &mut [u8; 8], a: __m512i) {
        *to = op!(_mm512_test_epi8_mask(a, a)).to_le_bytes();
    }
    #[inline(always)]
    fn unpack4(self, from: &[u8; 32]) -> __m512i {
        let x = mem!(_mm512_cvtepu8_epi16(_mm256_loadu_si256(from.as_ptr().cast())));
        self.and(self.or(x, op!(_mm512_slli_epi16::<4>(x))), self.splat_u8(15))
    }
    #[inline(always)]
    fn unpack2(self, from: &[u8; 16]) -> __m512i {
        let x = mem!(_mm512_cvtepu8_epi32(_mm_loadu_si128(from.as_ptr().cast())));
        let spread = self.or(self.or(x, self.shl::<6>(x)), self.or(self.shl::<12>(x), self.shl::<18>(x)));
        self.and(spread, self.splat_u8(3))
    }
    #[inline(always)]
    fn unpack1(self, from: &[u8; 8]) -> __m512i {
        op!(_mm512_maskz_set1_epi8(u64::from_le_bytes(*from), 1))
    }
}
