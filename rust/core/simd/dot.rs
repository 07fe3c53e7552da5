//! Dot products of bytes: the one operation that a single instruction set has in several versions.
//!
//! A [`Dot`] is an [`Isa`] together with the way it multiplies unsigned codes with signed activations. Every
//! way is exact, so which one runs is never visible in a result. Best is an instruction that does just that:
//! `vpdpbusd`, `usdot`. Without it codes below 128 have a way of their own (`maddubs`, whose two products then
//! fit 16 bits; `sdot`, whose bytes are all signed), and others one that makes them wider or moves them first. Where
//! many products of small codes fit 16 bits, no dot product is best: see `Short` in `multiply.rs`.

#![expect(unsafe_code, reason = "a token proves that the CPU has the instructions")]

use std::ops::RangeInclusive;

use super::amx::Amx;
use super::{Isa, Kernel, Scalar, Token};

#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(target_arch = "x86_64")]
mod x86;

/// An instruction set and its dot product of bytes.
pub(crate) trait Dot: Copy + Send + Sync {
    /// The instruction set.
    type Isa: Isa;
    /// Rows of a tile whose integer sums fit the registers, [`Dot::TILE_VECTORS`] vectors wide.
    const TILE_ROWS: usize = Self::Isa::TILE_ROWS;
    /// Vectors of such a tile: 1 or 4.
    const TILE_VECTORS: usize = Self::Isa::TILE_VECTORS;
    /// Whether those are multiplied side by side, or one after the other.
    const ABREAST: bool = true;

    /// Whether it is one instruction.
    const INSTRUCTION: bool = false;
    /// What it takes off every code before it multiplies.
    const OFFSET: i32 = 0;
    /// Bits of the codes that it is chosen for.
    const BITS: RangeInclusive<usize> = 1..=8;

    /// The token of the instruction set.
    fn isa(self) -> Self::Isa;

    /// The unit that multiplies whole blocks of the same bytes, if the CPU has one.
    #[inline(always)]
    fn blocks(self) -> Option<Amx> {
        None
    }

    /// Lane `i` of `acc` plus the products of codes 4·i … 4·i + 3 (unsigned), less [`Dot::OFFSET`], with the four
    /// bytes of `word` (signed, none −128).
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
        Token::Avx2(isa) => match (x86::Avx2Vnni::<false>::detect(isa), x86::Avx2Vnni::<true>::detect(isa)) {
            (Some(dot), _) => dot.vectorize(kernel),
            (None, Some(dot)) => dot.vectorize(kernel),
            (None, None) if narrow => x86::Avx2Dot::<true>(isa).vectorize(kernel),
            (None, None) => x86::Avx2Dot::<false>(isa).vectorize(kernel),
        },
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

/// Whether the dot product of `token` is one instruction.
#[cfg(target_arch = "x86_64")]
pub(crate) fn has_instruction(token: Token) -> bool {
    struct Asked;

    impl DotKernel for Asked {
        type Output = bool;

        #[inline(always)]
        fn run<D: Dot>(self, _: D) -> bool {
            D::INSTRUCTION
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

    /// So that whatever drives the unit is tested on every CPU.
    #[cfg(test)]
    fn blocks(self) -> Option<Amx> {
        Some(Amx::stand_in())
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
            for word in [0x7f7f_7f7f_i32, -0x7e7e_7e7f, 0x0181_7f81, 0x7f81_7f81, 0] {
                for (i, code) in codes.iter_mut().enumerate() {
                    *code = match i % 5 {
                        0 => self.max_code,
                        1 => 0,
                        _ => (i * 37 + 11) as u8 & self.max_code,
                    };
                }
                let words = isa.words(isa.load_u8(&codes));
                let x: i32 = word.to_le_bytes().iter().map(|x| i32::from(*x as i8)).sum();
                acc = isa.add_i32(acc, isa.splat_i32(D::OFFSET * x));
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
