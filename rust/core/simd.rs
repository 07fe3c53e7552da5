//! One logical vector for every CPU: 16 lanes of f32 or i32, 64 lanes of bytes.
//!
//! The number contract counts in 16 lanes (sums, tiles of random bits), so an algorithm written over [`Isa`]
//! has no remainder logic of its own and gives the same bits on every instruction set. How many registers a
//! logical vector takes is the ISA's business: one zmm, two ymm, four NEON q registers, an array.
//!
//! A token such as `Avx2` can only be had where the CPU has those instructions; holding one is the proof
//! that makes the methods of its `impl Isa` sound. [`dispatch`] is the one place that asks which token to use.
//! All `unsafe` of the crate is in this module.

use std::sync::atomic::{AtomicU8, Ordering};

use half::{bf16, f16};

use crate::error::Error;

pub(crate) mod amx;
pub(crate) mod dot;
pub(crate) mod floats;
pub(crate) mod multiply;
mod scalar;
pub use scalar::Scalar;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
pub use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub use avx512::Avx512;

#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(target_arch = "aarch64")]
pub use neon::Neon;

/// Lanes of a vector of f32 or i32.
pub const LANES: usize = 16;
/// Vectors of lanes side by side in the widest tiles of products.
pub const VECTORS: usize = 4;
/// Bytes of a vector of codes: four vectors of lanes.
pub const TILE: usize = 4 * LANES;

/// The vector operations the algorithms need, and no others.
///
/// Lane `i` of a result depends on lane `i` of the operands unless said otherwise. Every f32 operation is one
/// IEEE rounding to nearest even; none is contracted. "RNE" is rounding to nearest, ties to even.
pub trait Isa: Copy + Send + Sync + 'static {
    /// 16 lanes of f32.
    type F32: Copy;
    /// 16 lanes of i32, wrapping; also read as u32 where the name says so.
    type I32: Copy;
    /// 16 truth values.
    type Mask: Copy;
    /// 64 bytes.
    type U8: Copy;
    /// 16 lanes of u64 in whatever lane order suits [`Isa::wide_mul`].
    type Wide: Copy;

    /// Name as users see and force it.
    const NAME: &'static str;
    /// Whether two Philox tiles fit the registers at once.
    const TWO_TILES: bool = false;
    /// Rows of a tile of products whose sums fit the registers, [`Isa::TILE_VECTORS`] vectors wide.
    const TILE_ROWS: usize;
    /// Vectors of such a tile: 1 or [`VECTORS`].
    const TILE_VECTORS: usize;

    /// Runs `kernel` with this instruction set enabled, so that everything in it inlines.
    ///
    /// Itself never inlined: a kernel that another one runs keeps its loop, and its registers, to itself.
    fn vectorize<K: Kernel>(self, kernel: K) -> K::Output;

    // ---- f32 ----------------------------------------------------------------------------------------------

    /// `value` in every lane.
    fn splat(self, value: f32) -> Self::F32;
    /// Lanes from memory.
    fn load(self, from: &[f32; 16]) -> Self::F32;
    /// Lanes from f64, RNE.
    fn load_f64(self, from: &[f64; 16]) -> Self::F32;
    /// Lanes from bfloat16 (exact).
    fn load_bf16(self, from: &[bf16; 16]) -> Self::F32;
    /// Lanes from half precision (exact, subnormals included).
    fn load_f16(self, from: &[f16; 16]) -> Self::F32;
    /// Lanes to memory; `STREAM` bypasses the caches where `to` is aligned to 64 bytes.
    fn store<const STREAM: bool>(self, to: &mut [f32; 16], v: Self::F32);
    /// Lanes to f64 (exact).
    fn store_f64<const STREAM: bool>(self, to: &mut [f64; 16], v: Self::F32);
    /// Lanes to bfloat16, RNE. No NaN but [`f32::NAN`].
    fn store_bf16<const STREAM: bool>(self, to: &mut [bf16; 16], v: Self::F32);
    /// Lanes to half precision, RNE, to infinity above its range. No NaN but [`f32::NAN`].
    fn store_f16<const STREAM: bool>(self, to: &mut [f16; 16], v: Self::F32);
    /// Makes streamed stores visible to other threads; call once after the last of them.
    fn fence(self);

    /// a + b
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// a − b
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// a · b
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// a / b
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// a · b + c with one rounding.
    fn mul_add(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32;
    /// c − a · b with one rounding.
    fn neg_mul_add(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32;
    /// The smaller of two lanes that are not NaN.
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// The larger of two lanes that are not NaN.
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// Largest integer not above.
    fn floor(self, a: Self::F32) -> Self::F32;
    /// Lanes in −2^24…0 to the nearest multiple of 1/256, RNE; others unspecified.
    #[inline(always)]
    fn negative_to_256ths(self, a: Self::F32) -> Self::F32 {
        // The sum lies in 2^15…2^16, where that is the spacing, or is exact.
        let c = self.splat(65536.0);
        self.sub(self.add(a, c), c)
    }
    /// The bits of the lanes.
    fn to_bits(self, a: Self::F32) -> Self::I32;
    /// The f32 of those bits.
    #[expect(clippy::wrong_self_convention, reason = "named like f32::from_bits; self is the token")]
    fn from_bits(self, a: Self::I32) -> Self::F32;
    /// Lanes as integers, RNE; unspecified outside i32.
    fn round(self, a: Self::F32) -> Self::I32;
    /// Integers as f32, RNE.
    fn to_f32(self, a: Self::I32) -> Self::F32;
    /// Byte `B` of each lane, which must be below 16, as f32.
    #[inline(always)]
    fn nibble_to_f32<const B: u32>(self, a: Self::I32) -> Self::F32 {
        self.to_f32(self.byte::<B>(a))
    }
    /// a > b, false for NaN.
    fn gt(self, a: Self::F32, b: Self::F32) -> Self::Mask;
    /// Sign bit set.
    fn negative(self, a: Self::F32) -> Self::Mask;
    /// Lane of `a` where true, of `b` where false.
    fn select(self, mask: Self::Mask, a: Self::F32, b: Self::F32) -> Self::F32;
    /// Lane of `a` where true, of `b` where false.
    fn select_i32(self, mask: Self::Mask, a: Self::I32, b: Self::I32) -> Self::I32;
    /// Exchanges lanes so that sums over lanes `j` and `j + H` of two vectors become one addition.
    ///
    /// With the lanes seen in blocks of `2H`, the first result takes the first half of each block and the
    /// second result the second half. H = 8 gives `(a[..8] b[..8], a[8..] b[8..])`; H = 4 gives
    /// `(a[0..4] a[8..12] b[0..4] b[8..12], a[4..8] a[12..16] b[4..8] b[12..16])`. H = 2 and 1 do the same
    /// within each run of four lanes: `(a0 a1 b0 b1, a2 a3 b2 b3)` and `(a0 a2 b0 b2, a1 a3 b1 b3)`.
    fn split<const H: usize>(self, a: Self::F32, b: Self::F32) -> (Self::F32, Self::F32);

    // ---- i32 ----------------------------------------------------------------------------------------------

    /// `value` in every lane.
    fn splat_i32(self, value: i32) -> Self::I32;
    /// Lanes from memory.
    fn load_i32(self, from: &[u32; 16]) -> Self::I32;
    /// Lanes to memory.
    fn store_i32(self, to: &mut [u32; 16], v: Self::I32);
    /// a + b
    fn add_i32(self, a: Self::I32, b: Self::I32) -> Self::I32;
    /// a − b
    fn sub_i32(self, a: Self::I32, b: Self::I32) -> Self::I32;
    /// Low half of a · b.
    fn mul_i32(self, a: Self::I32, b: Self::I32) -> Self::I32;
    /// Bitwise and.
    fn and(self, a: Self::I32, b: Self::I32) -> Self::I32;
    /// Bitwise or.
    fn or(self, a: Self::I32, b: Self::I32) -> Self::I32;
    /// Bitwise exclusive or.
    fn xor(self, a: Self::I32, b: Self::I32) -> Self::I32;
    /// Shift left by a constant.
    fn shl<const N: u32>(self, a: Self::I32) -> Self::I32;
    /// Shift right by a constant, zeros in.
    fn shr<const N: u32>(self, a: Self::I32) -> Self::I32;
    /// Shift right by a constant, sign in.
    fn sar<const N: u32>(self, a: Self::I32) -> Self::I32;
    /// Byte `B` of each lane, the lowest being 0.
    #[inline(always)]
    fn byte<const B: u32>(self, a: Self::I32) -> Self::I32 {
        let byte = match B {
            0 => a,
            1 => self.shr::<8>(a),
            2 => self.shr::<16>(a),
            _ => return self.shr::<24>(a),
        };
        self.and(byte, self.splat_i32(255))
    }
    /// The larger, signed.
    fn max_i32(self, a: Self::I32, b: Self::I32) -> Self::I32;
    /// The larger, unsigned.
    fn max_u32(self, a: Self::I32, b: Self::I32) -> Self::I32;
    /// Even lanes to themselves and to their odd neighbours.
    fn repeat_even(self, a: Self::I32) -> Self::I32;
    /// False only if no lane is less than 4 modulo 2^16.
    ///
    /// Where asking costs more than it saves, the answer is always true.
    #[inline(always)]
    fn any_low_half_below_4(self, _v: [Self::I32; 4]) -> bool {
        true
    }
    /// Lane `i` becomes the sum of lanes 0 to `i`.
    #[inline(always)]
    fn prefix_sum(self, a: Self::I32) -> Self::I32 {
        let mut lanes = [0; 16];
        self.store_i32(&mut lanes, a);
        for i in 1..16 {
            lanes[i] = lanes[i].wrapping_add(lanes[i - 1]);
        }
        self.load_i32(&lanes)
    }
    /// Lane 15 in every lane.
    #[inline(always)]
    fn splat_last(self, a: Self::I32) -> Self::I32 {
        let mut lanes = [0; 16];
        self.store_i32(&mut lanes, a);
        self.splat_i32(lanes[15].cast_signed())
    }
    /// By how much each of the 64 lanes of `v`, in order, raises the high byte of a running sum that begins at
    /// `start` < 2^24; modulo 256.
    #[inline(always)]
    fn high_byte_steps(self, v: [Self::I32; 4], start: i32) -> Self::U8 {
        let mut before = self.splat_i32(start);
        let mut high = v;
        for j in 0..4 {
            let sums = self.add_i32(self.prefix_sum(v[j]), before);
            before = self.splat_last(sums);
            high[j] = self.shr::<24>(sums);
        }
        let high = self.narrow(high, 0, u8::MAX);
        self.sub_u8(high, self.previous_u8(high))
    }

    // ---- u64, for Philox ----------------------------------------------------------------------------------

    /// Lanes widened; the high halves are unspecified.
    fn wide(self, a: Self::I32) -> Self::Wide;
    /// `value` in the low half of every lane.
    fn wide_splat(self, value: u32) -> Self::Wide;
    /// Low half of each lane times `m`, in full.
    fn wide_mul(self, a: Self::Wide, m: u32) -> Self::Wide;
    /// High half of each lane moved to the low half.
    fn wide_high(self, a: Self::Wide) -> Self::Wide;
    /// Bitwise exclusive or of three.
    fn wide_xor3(self, a: Self::Wide, b: Self::Wide, c: Self::Wide) -> Self::Wide;
    /// The low halves as lanes, in order.
    fn narrow_wide(self, a: Self::Wide) -> Self::I32;
    /// The high halves as lanes, in order.
    #[inline(always)]
    fn narrow_wide_high(self, a: Self::Wide) -> Self::I32 {
        self.narrow_wide(self.wide_high(a))
    }

    // ---- bytes --------------------------------------------------------------------------------------------

    /// Bytes from memory.
    fn load_u8(self, from: &[u8; 64]) -> Self::U8;
    /// Bytes to memory.
    fn store_u8(self, to: &mut [u8; 64], v: Self::U8);
    /// `value` in every byte.
    fn splat_u8(self, value: u8) -> Self::U8;
    /// a + b, wrapping.
    fn add_u8(self, a: Self::U8, b: Self::U8) -> Self::U8;
    /// a − b, wrapping.
    fn sub_u8(self, a: Self::U8, b: Self::U8) -> Self::U8;
    /// Bytes 4·i … 4·i + 3 as lane `i`, first byte lowest.
    fn words(self, a: Self::U8) -> Self::I32;
    /// Inverse of [`Isa::words`].
    fn bytes(self, a: Self::I32) -> Self::U8;
    /// Asks the second cache for the line `ahead` bytes behind `from`, which need not exist: requests of the first
    /// one are few, and soon stand in the way of its own. Nothing but speed depends on it.
    #[inline(always)]
    fn prefetch<T>(self, _from: &T, _ahead: usize) {}
    /// (a >> shift) & mask in every byte; `shift` at most 7, `mask` of at most 8 − shift low bits.
    fn shr_and_u8(self, a: Self::U8, shift: u32, mask: u8) -> Self::U8;
    /// (a << shift) & mask in every byte; `shift` at most 7, `mask` of at most 8 − shift high bits.
    fn shl_and_u8(self, a: Self::U8, shift: u32, mask: u8) -> Self::U8;
    /// a | b
    fn or_u8(self, a: Self::U8, b: Self::U8) -> Self::U8;
    /// (a << shift) | b in every byte; no bit of `a` may leave its byte.
    fn shl_or_u8(self, a: Self::U8, shift: u32, b: Self::U8) -> Self::U8;
    /// Byte `i` becomes byte `i − 1`; byte 0 becomes 0.
    fn previous_u8(self, a: Self::U8) -> Self::U8;
    /// `table[a]` in every byte; all bytes must be below 16.
    fn lookup_u8(self, a: Self::U8, table: &[u8; 16]) -> Self::U8;
    /// clamp(v + z, 0, max) as bytes: lane `i` of `v[j]` becomes byte 16·j + i. Any `v`; |z| < 2^15.
    fn narrow(self, v: [Self::I32; 4], z: i32, max: u8) -> Self::U8;
    /// (v >> 16) + z as bytes, in the order of [`Isa::narrow`]; all of them must lie in 0…255. |z| < 2^15.
    #[inline(always)]
    fn narrow_high(self, v: [Self::I32; 4], z: i32) -> Self::U8 {
        self.narrow(four!(j => self.sar::<16>(v[j])), z, u8::MAX)
    }
    /// Bytes 16·j + i to lane `i` of vector `j`, zero-extended.
    fn widen(self, a: Self::U8) -> [Self::I32; 4];
    /// Nibbles, element `i` at bit 4·i; bytes must be below 16.
    fn pack4(self, to: &mut [u8; 32], a: Self::U8);
    /// Fields of 2 bits, element `i` at bit 2·i; bytes must be below 4.
    fn pack2(self, to: &mut [u8; 16], a: Self::U8);
    /// Single bits, element `i` at bit `i`; bytes must be 0 or 1.
    fn pack1(self, to: &mut [u8; 8], a: Self::U8);
    /// Inverse of `pack4`.
    fn unpack4(self, from: &[u8; 32]) -> Self::U8;
    /// Inverse of `pack2`.
    fn unpack2(self, from: &[u8; 16]) -> Self::U8;
    /// Inverse of `pack1`.
    fn unpack1(self, from: &[u8; 8]) -> Self::U8;
}

/// `$value` for each of the four vectors of a tile, `$j` counting them.
///
/// A macro, not a closure: the compiler may leave a closure on its own, and what is not inlined into
/// [`Isa::vectorize`] is compiled without the instruction set.
macro_rules! four {
    ($j:ident => $value:expr) => {
        [
            {
                let $j = 0;
                $value
            },
            {
                let $j = 1;
                $value
            },
            {
                let $j = 2;
                $value
            },
            {
                let $j = 3;
                $value
            },
        ]
    };
}
pub(crate) use four;

/// A value that begins at a cache line: whole vectors in it then never straddle two lines.
#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
pub(crate) struct Aligned<T>(pub(crate) T);

/// `f` of each index; unlike [`std::array::from_fn`] certain to be inlined.
#[inline(always)]
pub(crate) fn array<T: Copy + Default, const N: usize>(f: impl Fn(usize) -> T) -> [T; N] {
    let mut array = [T::default(); N];
    for i in 0..N {
        array[i] = f(i);
    }
    array
}

/// The order in which a shuffle within runs of 16 bytes brings byte `b` of each lane to its lowest, zeros above it.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) fn byte_of_lanes(b: u32) -> [u8; 64] {
    array(|i| if i % 4 == 0 { (i % 16) as u8 + b as u8 } else { 0x80 })
}

/// Combines the 16 lanes of each of 16 vectors: lane `r` of the result is row `r` folded with `op`.
///
/// Lanes j and j + 8 are combined first, then j + 4, j + 2, j + 1: the order of every sum in the contract.
/// Each step halves the number of vectors, so 16 folds take 15 operations instead of 64.
#[inline(always)]
pub(crate) fn fold<I: Isa>(isa: I, rows: &[I::F32; 16], op: impl Fn(I::F32, I::F32) -> I::F32) -> I::F32 {
    // The order of rows that the four exchanges turn into lanes 0 to 15.
    const ROW: [usize; 16] = [0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15];
    let mut v = *rows;
    for i in 0..16 {
        v[i] = rows[ROW[i]];
    }
    for i in 0..8 {
        let (low, high) = isa.split::<8>(v[i], v[i + 8]);
        v[i] = op(low, high);
    }
    for i in 0..4 {
        let (low, high) = isa.split::<4>(v[i], v[i + 4]);
        v[i] = op(low, high);
    }
    for i in 0..2 {
        let (low, high) = isa.split::<2>(v[i], v[i + 2]);
        v[i] = op(low, high);
    }
    let (low, high) = isa.split::<1>(v[0], v[1]);
    op(low, high)
}

/// The sum of 16 numbers, in the order of [`fold`].
#[inline(always)]
pub(crate) fn total(mut lanes: [f32; LANES]) -> f32 {
    for half in [8, 4, 2, 1] {
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
        }
    }
    lanes[0]
}

/// An algorithm with its operands as fields, to run on any instruction set.
///
/// `run` must be `#[inline(always)]`, as must be everything it calls on the hot path: only code inlined into
/// [`Isa::vectorize`] is compiled for the instruction set.
pub trait Kernel {
    /// What it returns.
    type Output;
    /// The algorithm.
    fn run<I: Isa>(self, isa: I) -> Self::Output;
}

/// The instruction sets of this build, as tokens.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Token {
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    #[cfg(target_arch = "aarch64")]
    Neon(Neon),
    Scalar(Scalar),
}

impl Token {
    /// The tokens this CPU grants, best first.
    pub(crate) fn available() -> Vec<Self> {
        let tokens = [
            #[cfg(target_arch = "x86_64")]
            Avx512::detect().map(Self::Avx512),
            #[cfg(target_arch = "x86_64")]
            Avx2::detect().map(Self::Avx2),
            #[cfg(target_arch = "aarch64")]
            Neon::detect().map(Self::Neon),
            Some(Self::Scalar(Scalar)),
        ];
        tokens.into_iter().flatten().collect()
    }

    /// The token in use: the forced one, else the best.
    pub(crate) fn active() -> Self {
        let chosen = CHOICE.load(Ordering::Relaxed);
        let tokens = Self::available;
        if let Some(token) = tokens().into_iter().find(|token| token.index() == chosen) {
            return token;
        }
        let best = tokens()[0];
        CHOICE.store(best.index(), Ordering::Relaxed);
        best
    }

    pub(crate) fn name(self) -> &'static str {
        COMPILED[usize::from(self.index())]
    }

    /// Position in [`COMPILED`].
    fn index(self) -> u8 {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(_) => 0,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(_) => 1,
            #[cfg(target_arch = "aarch64")]
            Self::Neon(_) => 0,
            Self::Scalar(_) => COMPILED.len() as u8 - 1,
        }
    }

    /// Runs `kernel` on this instruction set.
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(isa) => isa.vectorize(kernel),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(isa) => isa.vectorize(kernel),
            #[cfg(target_arch = "aarch64")]
            Self::Neon(isa) => isa.vectorize(kernel),
            Self::Scalar(isa) => isa.vectorize(kernel),
        }
    }
}

/// Names of the instruction sets of this build, best first.
const COMPILED: &[&str] = &[
    #[cfg(target_arch = "x86_64")]
    Avx512::NAME,
    #[cfg(target_arch = "x86_64")]
    Avx2::NAME,
    #[cfg(target_arch = "aarch64")]
    Neon::NAME,
    Scalar::NAME,
];

/// Index of the token in use.
static CHOICE: AtomicU8 = AtomicU8::new(UNDECIDED);
const UNDECIDED: u8 = u8::MAX;

/// Runs `kernel` on the instruction set in use.
pub fn dispatch<K: Kernel>(kernel: K) -> K::Output {
    Token::active().run(kernel)
}

/// Name of the instruction set in use.
pub fn active_isa() -> &'static str {
    Token::active().name()
}

/// Names of the instruction sets this CPU can run, best first.
pub fn available_isas() -> Vec<&'static str> {
    Token::available().into_iter().map(Token::name).collect()
}

/// Names of the instruction sets compiled into this build, best first.
pub fn compiled_isas() -> &'static [&'static str] {
    COMPILED
}

/// Uses the named instruction set from now on; `None` returns to the best one.
///
/// Errors: [`Error::Isa`] if this CPU or this build does not have it.
pub fn force_isa(name: Option<&str>) -> Result<(), Error> {
    let Some(name) = name else {
        CHOICE.store(UNDECIDED, Ordering::Relaxed);
        return Ok(());
    };
    match Token::available().into_iter().find(|token| token.name() == name) {
        Some(token) => CHOICE.store(token.index(), Ordering::Relaxed),
        None => return Err(Error::Isa { name: name.to_owned(), available: available_isas() }),
    }
    Ok(())
}
