//! Dot products of bytes: the one operation that a single instruction set has in several versions.
//!
//! A [`Dot`] is an [`Isa`] together with the way it multiplies unsigned codes with signed activations. Every
//! way is exact, so which one runs is never visible in a result. Best is an instruction that does just that:
//! `vpdpbusd`, `usdot`. Without it codes below 128 have a way of their own (`maddubs`, whose two products then
//! fit 16 bits; `sdot`, whose bytes are all signed), and others one that makes them wider or moves them first.

#![expect(unsafe_code, reason = "a token proves that the CPU has the instructions")]

use super::amx::Amx;
use super::{Isa, Kernel, Scalar, Token};

/// An instruction set and its dot product of bytes.
pub(crate) trait Dot: Copy + Send + Sync {
    /// The instruction set.
    type Isa: Isa;
    /// Rows of a tile whose integer sums fit the registers, [`Dot::TILE_VECTORS`] vectors wide.
    const TILE_ROWS: usize = Self::Isa::TILE_ROWS;
    /// Vectors of such a tile: 1 or 4.
    const TILE_VECTORS: usize = Self::Isa::TILE_VECTORS;

    /// The token of the instruction set.
    fn isa(self) -> Self::Isa;

    /// The unit that multiplies whole blocks of the same bytes, if the CPU has one.
    #[inline(always)]
    fn blocks(self) -> Option<Amx> {
        None
    }

    /// Lane `i` of `acc` plus the products of codes 4·i … 4·i + 3 (unsigned) with the four bytes of `word`
    /// (signed, none −128).
    fn dot(
        self,
        acc: <Self::Isa as Isa>::I32,
        codes: <Self::Isa as Isa>::U8,
        word: i32,
    ) -> <Self::Isa as Isa>::I32;

    /// Runs `kernel` with the instructions of this dot product enabled.
    fn vectorize<K: DotKernel>(self, kernel: K) -> K::Output {
        self.isa().vectorize(Within { dot: self, kernel })
    }
}

/// Like [`Kernel`], for algorithms that need a [`Dot`].
pub(crate) trait DotKernel {
    /// What it returns.
    type Output;
    /// The algorithm.
    fn run<D: Dot>(self, dot: D) -> Self::Output;
}

/// A kernel that already knows its dot product, to be run by the instruction set that product belongs to.
struct Within<D, K> {
    dot: D,
    kernel: K,
}

impl<D: Dot, K: DotKernel> Kernel for Within<D, K> {
    type Output = K::Output;

    #[inline(always)]
    fn run<I: Isa>(self, _: I) -> K::Output {
        self.kernel.run(self.dot)
    }
}

/// Runs `kernel` on the instruction set of `token` with its best dot product for codes up to `max_code`.
pub(crate) fn dispatch_dot<K: DotKernel>(token: Token, max_code: u8, kernel: K) -> K::Output {
    let narrow = max_code < 128;
    match token {
        #[cfg(target_arch = "x86_64")]
        Token::Avx512(isa) => match (x86::Vnni::detect(isa), narrow) {
            (Some(dot), _) => dot.vectorize(kernel),
            (None, true) => x86::Avx512Dot::<true>(isa).vectorize(kernel),
            (None, false) => x86::Avx512Dot::<false>(isa).vectorize(kernel),
        },
        #[cfg(target_arch = "x86_64")]
        Token::Avx2(isa) => {
            match (x86::Avx2Vnni::<false>::detect(isa), x86::Avx2Vnni::<true>::detect(isa), narrow) {
                (Some(dot), _, _) => dot.vectorize(kernel),
                (None, Some(dot), _) => dot.vectorize(kernel),
                (None, None, true) => x86::Avx2Dot::<true>(isa).vectorize(kernel),
                (None, None, false) => x86::Avx2Dot::<false>(isa).vectorize(kernel),
            }
        }
        #[cfg(target_arch = "aarch64")]
        Token::Neon(isa) => match (neon::Usdot::detect(isa), neon::Sdot::detect(isa), narrow) {
            (Some(dot), _, _) => dot.vectorize(kernel),
            (None, Some(sdot), true) => neon::SdotDot::<true>(sdot).vectorize(kernel),
            (None, Some(sdot), false) => neon::SdotDot::<false>(sdot).vectorize(kernel),
            (None, None, _) => neon::NeonDot(isa).vectorize(kernel),
        },
        Token::Scalar(isa) => Dot::vectorize(isa, kernel),
    }
}

/// Whether the dot product of `token` comes with a unit for whole blocks.
pub(crate) fn has_blocks(token: Token) -> bool {
    struct Asked;

    impl DotKernel for Asked {
        type Output = bool;

        #[inline(always)]
        fn run<D: Dot>(self, dot: D) -> bool {
            dot.blocks().is_some()
        }
    }

    dispatch_dot(token, u8::MAX, Asked)
}

impl Dot for Scalar {
    type Isa = Self;

    #[inline(always)]
    fn isa(self) -> Self {
        self
    }

    #[inline(always)]
    fn dot(self, acc: [i32; 16], codes: [u8; 64], word: i32) -> [i32; 16] {
        // Factors of 16 bits in lanes of 32: compilers have a cheap multiplication for those.
        let x = word.to_le_bytes().map(|byte| i32::from(byte as i8));
        let words = self.words(codes);
        std::array::from_fn(|i| {
            let w = words[i].cast_unsigned();
            let byte = |j: usize| ((w >> (8 * j)) & 255).cast_signed();
            let products = byte(0) * x[0] + byte(1) * x[1] + byte(2) * x[2] + byte(3) * x[3];
            acc[i].wrapping_add(products)
        })
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::super::amx::Amx;
    use super::super::{Avx2, Avx512};
    use super::{Dot, DotKernel};

    /// AVX2; `NARROW` promises codes below 128.
    #[derive(Clone, Copy)]
    pub(super) struct Avx2Dot<const NARROW: bool>(pub(super) Avx2);

    impl<const NARROW: bool> Dot for Avx2Dot<NARROW> {
        type Isa = Avx2;
        const TILE_ROWS: usize = 4;

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

    /// Eight lanes of [`Dot::dot`].
    ///
    /// # Safety
    ///
    /// The CPU must have AVX2.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn dot_ymm<const NARROW: bool>(acc: __m256i, codes: __m256i, word: i32) -> __m256i {
        let x = _mm256_set1_epi32(word);
        if NARROW {
            let pairs = _mm256_maddubs_epi16(codes, x);
            return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
        }
        let even = _mm256_madd_epi16(
            _mm256_and_si256(codes, _mm256_set1_epi16(0xff)),
            _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(x)),
        );
        let odd = _mm256_madd_epi16(_mm256_srli_epi16::<8>(codes), _mm256_srai_epi16::<8>(x));
        _mm256_add_epi32(acc, _mm256_add_epi32(even, odd))
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

        #[inline(always)]
        fn isa(self) -> Avx2 {
            self.0
        }

        #[inline(always)]
        fn dot(self, acc: [__m256i; 2], codes: [__m256i; 2], word: i32) -> [__m256i; 2] {
            // SAFETY: the token proves AVX2, and `detect` found the encoding.
            unsafe {
                [dpbusd_ymm::<EVEX>(acc[0], codes[0], word), dpbusd_ymm::<EVEX>(acc[1], codes[1], word)]
            }
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
}

#[cfg(target_arch = "aarch64")]
mod neon {
    use std::arch::aarch64::*;
    use std::arch::{asm, is_aarch64_feature_detected};

    use super::super::Neon;
    use super::{Dot, DotKernel};

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

    /// [`Dot::dot`] by `sdot`. Wide codes u become the signed u − 128, and 128·Σx is added: twice 64·Σx.
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
        let quarter = |acc, codes| unsafe { sdot(acc, vreinterpretq_s8_u8(codes), x) };
        if NARROW {
            return [
                quarter(acc[0], codes[0]),
                quarter(acc[1], codes[1]),
                quarter(acc[2], codes[2]),
                quarter(acc[3], codes[3]),
            ];
        }
        let (top, half) = (vdupq_n_u8(128), vdupq_n_u8(64));
        let centre = quarter(quarter(vdupq_n_s32(0), half), half);
        let wide = |i: usize| quarter(vaddq_s32(acc[i], centre), veorq_u8(codes[i], top));
        [wide(0), wide(1), wide(2), wide(3)]
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
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two dot products with extreme and ordinary bytes, one added to the other.
    struct Probe {
        max_code: u8,
    }

    impl DotKernel for Probe {
        type Output = [u32; 16];

        #[inline(always)]
        fn run<D: Dot>(self, dot: D) -> [u32; 16] {
            let isa = dot.isa();
            let (mut codes, mut acc) = ([0; 64], isa.splat_i32(7));
            for word in [0x7f7f_7f7f, -0x7e7e_7e7f, 0x0180_7f81 | 1, 0] {
                for (i, code) in codes.iter_mut().enumerate() {
                    *code = if i % 5 == 0 { self.max_code } else { (i * 37 + 11) as u8 & self.max_code };
                }
                let words = isa.words(isa.load_u8(&codes));
                acc = dot.dot(acc, isa.bytes(words), word);
                isa.store_u8(&mut codes, isa.bytes(words));
            }
            let mut sums = [0; 16];
            isa.store_i32(&mut sums, acc);
            sums
        }
    }

    fn check<D: Dot>(dot: D, max_code: u8) {
        let expected = Dot::vectorize(Scalar, Probe { max_code });
        let name = std::any::type_name::<D>();
        assert_eq!(dot.vectorize(Probe { max_code }), expected, "{name}, codes up to {max_code}");
    }

    /// Checks every dot product of this CPU, those included that a better one hides from [`dispatch_dot`].
    #[cfg(target_arch = "x86_64")]
    fn check_each(max_code: u8) {
        if let Some(isa) = super::super::Avx2::detect() {
            x86::Avx2Vnni::<false>::detect(isa).inspect(|dot| check(*dot, max_code));
            x86::Avx2Vnni::<true>::detect(isa).inspect(|dot| check(*dot, max_code));
            check(x86::Avx2Dot::<false>(isa), max_code);
            if max_code < 128 {
                check(x86::Avx2Dot::<true>(isa), max_code);
            }
        }
        if let Some(isa) = super::super::Avx512::detect() {
            x86::Vnni::detect(isa).inspect(|dot| check(*dot, max_code));
            check(x86::Avx512Dot::<false>(isa), max_code);
            if max_code < 128 {
                check(x86::Avx512Dot::<true>(isa), max_code);
            }
        }
    }

    /// Checks every dot product of this CPU, those included that a better one hides from [`dispatch_dot`].
    #[cfg(target_arch = "aarch64")]
    fn check_each(max_code: u8) {
        if let Some(isa) = super::super::Neon::detect() {
            neon::Usdot::detect(isa).inspect(|dot| check(*dot, max_code));
            if let Some(sdot) = neon::Sdot::detect(isa) {
                check(neon::SdotDot::<false>(sdot), max_code);
                if max_code < 128 {
                    check(neon::SdotDot::<true>(sdot), max_code);
                }
            }
            check(neon::NeonDot(isa), max_code);
        }
    }

    /// Other targets have plain loops alone.
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    fn check_each(max_code: u8) {
        check(Scalar, max_code);
    }

    #[test]
    fn every_dot_product_is_exact() {
        for max_code in [1, 15, 127, 255] {
            let expected = Dot::vectorize(Scalar, Probe { max_code });
            for token in Token::available() {
                assert_eq!(dispatch_dot(token, max_code, Probe { max_code }), expected, "{}", token.name());
            }
            check_each(max_code);
        }
    }
}
