//! AMX: a unit with eight registers of 16 rows of 64 bytes, which multiplies whole tiles of bytes.
//!
//! Rust has no intrinsics for it yet, so this is assembly. The tiles have a shape, which the thread carries
//! along ([`Tiles`]); what they hold never outlives one block of assembly.
//!
//! Other targets, and CPUs without AMX, have no token; there the tests stand in for the unit with plain loops.

#![cfg_attr(all(target_arch = "x86_64", target_os = "linux"), expect(unsafe_code, reason = "assembly"))]

use std::cell::Cell;
use std::marker::PhantomData;

use super::VECTORS;

/// Rows of x that a block multiplies at a time: two tiles.
pub(crate) const ROWS: usize = 32;
/// Rows of 16 sums for each vector of a block.
pub(crate) type Products = [[[u32; 16]; VECTORS]];

/// Memory to ask for during a block: `lines` cache lines at each step, from `from` on. None need exist.
#[derive(Clone, Copy)]
pub(crate) struct Prefetch {
    pub(crate) from: *const u8,
    pub(crate) lines: usize,
}

/// Proof that the CPU has AMX for bytes and that the system lets this process use it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Amx {
    /// Plain loops instead, to test what drives the unit where there is none.
    emulated: bool,
}

impl Amx {
    /// Plain loops in place of the unit.
    #[cfg(test)]
    pub(super) fn stand_in() -> Self {
        Self { emulated: true }
    }

    /// The token, if there is one to have. Asks the system for permission, once.
    pub(crate) fn detect() -> Option<Self> {
        match unit::granted() {
            true => Some(Self { emulated: false }),
            false => cfg!(test).then_some(Self { emulated: true }),
        }
    }

    /// Shapes the tiles of this thread for blocks of `rows` rows of x, at most [`ROWS`], and codes in that order.
    ///
    /// Panics if the thread has them in use already.
    pub(crate) fn tiles(self, rows: usize, order: Order) -> Tiles {
        assert!((1..=ROWS).contains(&rows) && matches!(order.words(), 8 | 16));
        assert!(!IN_USE.replace(true), "the tiles of a thread have one shape at a time");
        let tiles = Tiles { rows, order, emulated: self.emulated, thread: PhantomData };
        if !self.emulated {
            unit::shape(rows, order.words());
        }
        tiles
    }
}

/// Which words of codes a step takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// `words` words of four columns, 8 or 16, that follow one another: codes are `[step][vector][word]`.
    Together { words: usize },
    /// One of each of 16 runs of [`RUN`] words: codes are `[16 runs][vector][step of `RUN`]`.
    Apart,
}

/// Words of a run of [`Order::Apart`].
const RUN: usize = 8;

impl Order {
    /// Words of a step.
    fn words(self) -> usize {
        match self {
            Self::Together { words } => words,
            Self::Apart => 16,
        }
    }

    /// Where word `word` of vector `c` lies in step `step`.
    fn at(self, step: usize, c: usize, word: usize) -> usize {
        match self {
            Self::Together { words } => (step * VECTORS + c) * words + word,
            Self::Apart => ((step / RUN * 16 + word) * VECTORS + c) * RUN + step % RUN,
        }
    }
}

thread_local! {
    /// Whether this thread has a [`Tiles`].
    static IN_USE: Cell<bool> = const { Cell::new(false) };
}

/// The tiles of this thread, shaped.
pub(crate) struct Tiles {
    rows: usize,
    order: Order,
    emulated: bool,
    /// The shape is the thread's.
    thread: PhantomData<*const ()>,
}

impl Drop for Tiles {
    fn drop(&mut self) {
        if !self.emulated {
            unit::release();
        }
        IN_USE.set(false);
    }
}

impl Tiles {
    /// The products of some rows of x with a pair of vectors of a panel of codes: set, or added to what is there
    /// (`add`).
    ///
    /// * `x`: signed, `[step][row of 16][word]`; `strip` words behind it those of the rows from 16 on.
    /// * `codes`: unsigned, in their order; where words lie apart, of whole runs.
    /// * `products`: a row for each row of x.
    #[inline(always)]
    pub(crate) fn multiply(
        &self,
        x: &[[u8; 4]],
        strip: usize,
        codes: &[[u8; 64]],
        pair: usize,
        steps: usize,
        add: bool,
        products: &mut Products,
        prefetch: Prefetch,
    ) {
        assert!(pair < VECTORS / 2);
        let strips = (self.rows - 1) / 16;
        let x = &x[..strips * strip + steps * 16 * self.order.words()];
        let codes = &codes[..steps * VECTORS * self.order.words()];
        assert!(self.order != Order::Apart || steps.is_multiple_of(RUN));
        let products = &mut products[..self.rows];
        if cfg!(test) && self.emulated {
            return emulate(x, strip, codes, self.order, pair, steps, add, products);
        }
        let operands = Operands { x, strip, codes, pair, steps, add, products, prefetch };
        match (self.order, self.rows > 16) {
            (Order::Apart, true) => unit::multiply::<16, true, true>(operands),
            (Order::Apart, false) => unit::multiply::<16, true, false>(operands),
            (Order::Together { words: 16 }, true) => unit::multiply::<16, false, true>(operands),
            (Order::Together { words: 16 }, false) => unit::multiply::<16, false, false>(operands),
            (Order::Together { .. }, true) => unit::multiply::<8, false, true>(operands),
            (Order::Together { .. }, false) => unit::multiply::<8, false, false>(operands),
        }
    }

    /// Multiplies what the tiles of two strips hold `rounds` times, and nothing else: as fast as the unit goes.
    ///
    /// Returns how many multiply-adds those were. Panics if the tiles have fewer than [`ROWS`] rows.
    pub(crate) fn spin(&self, rounds: usize) -> usize {
        assert_eq!(self.rows, ROWS);
        if !self.emulated {
            unit::spin(rounds);
        }
        rounds * ROWS * 2 * 16 * 4 * self.order.words()
    }
}

/// Those of [`Tiles::multiply`], cut to what the shape of the tiles reads and writes.
struct Operands<'a> {
    x: &'a [[u8; 4]],
    strip: usize,
    codes: &'a [[u8; 64]],
    pair: usize,
    steps: usize,
    add: bool,
    products: &'a mut Products,
    prefetch: Prefetch,
}

/// [`Tiles::multiply`] in plain loops.
fn emulate(
    x: &[[u8; 4]],
    strip: usize,
    codes: &[[u8; 64]],
    order: Order,
    pair: usize,
    steps: usize,
    add: bool,
    products: &mut Products,
) {
    let words = order.words();
    for (row, products) in products.iter_mut().enumerate() {
        for (c, sums) in products.iter_mut().enumerate().skip(2 * pair).take(2) {
            if !add {
                *sums = [0; 16];
            }
            for (step, word) in (0..steps).flat_map(|step| (0..words).map(move |word| (step, word))) {
                let q = x[row / 16 * strip + (16 * step + row % 16) * words + word];
                let codes = &codes[order.at(step, c, word)];
                for (sum, codes) in sums.iter_mut().zip(codes.as_chunks::<4>().0) {
                    for (q, code) in q.iter().zip(codes) {
                        let product = i32::from(*q as i8) * i32::from(*code);
                        *sum = sum.wrapping_add(product.cast_unsigned());
                    }
                }
            }
        }
    }
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod unit {
    use std::arch::asm;
    use std::arch::x86_64::{__cpuid_count, _xgetbv};
    use std::sync::LazyLock;

    use super::{Operands, RUN, VECTORS};
    use crate::simd::Aligned;

    /// Assembly that writes to tiles.
    macro_rules! asm_with_tiles {
        ($($code:tt)*) => {
            asm!(
                $($code)*
                out("tmm0") _,
                out("tmm1") _,
                out("tmm2") _,
                out("tmm3") _,
                out("tmm4") _,
                out("tmm5") _,
                out("tmm6") _,
                out("tmm7") _,
                options(nostack),
            )
        };
    }

    /// Whether the CPU has AMX for bytes and the system grants it.
    pub(super) fn granted() -> bool {
        static GRANTED: LazyLock<bool> = LazyLock::new(|| has_amx() && request());
        *GRANTED
    }

    fn has_amx() -> bool {
        // AMX-TILE and AMX-INT8.
        const FEATURES: u32 = 3 << 24;
        // XTILECFG and XTILEDATA.
        const STATE: u64 = 3 << 17;
        if !is_x86_feature_detected!("xsave") {
            return false;
        }
        #[allow(unused_unsafe, reason = "safe since Rust 1.94; `expect` would fail with those before it")]
        // SAFETY: every x86-64 has the instruction.
        let leaf = unsafe { __cpuid_count(7, 0) };
        // SAFETY: that the feature is detected means that the system has enabled it.
        leaf.edx & FEATURES == FEATURES && unsafe { _xgetbv(0) } & STATE == STATE
    }

    /// Asks Linux to save the tiles of this process: they are too large to be saved unasked.
    fn request() -> bool {
        const ARCH_PRCTL: usize = 158;
        const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
        const XTILEDATA: usize = 18;
        let result: isize;
        // SAFETY: the call takes two integers and changes nothing but this permission.
        unsafe {
            asm!(
                "syscall",
                inout("rax") ARCH_PRCTL => result,
                in("rdi") ARCH_REQ_XCOMP_PERM,
                in("rsi") XTILEDATA,
                out("rcx") _,
                out("r11") _,
                options(nostack),
            );
        }
        result == 0
    }

    /// Shapes tiles 0 to 3 for sums, 4 and 5 for rows of x and 6 and 7 for codes. Only with a token.
    pub(super) fn shape(rows: usize, words: usize) {
        let low = rows.min(16) as u8;
        let high = (rows as u8).saturating_sub(16);
        let mut config = Aligned([0u8; 64]);
        // Palette 1; at 16 the bytes a row, two bytes each, at 48 the rows. A tile without rows is not in use.
        config.0[0] = 1;
        let bytes = 4 * words as u8;
        for (tile, (rows, bytes)) in [
            (low, 64),
            (low, 64),
            (high, 64),
            (high, 64),
            (low, bytes),
            (high, bytes),
            (words as u8, 64),
            (words as u8, 64),
        ]
        .into_iter()
        .enumerate()
        {
            if rows > 0 {
                (config.0[16 + 2 * tile], config.0[48 + tile]) = (bytes, rows);
            }
        }
        // SAFETY: a token exists, so the instruction does; the shape is a valid one.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const config.0, options(readonly, nostack)) }
    }

    /// Gives the tiles back. Only with a token.
    pub(super) fn release() {
        // SAFETY: a token exists, so the instruction does.
        unsafe { asm!("tilerelease", options(nomem, nostack)) }
    }

    /// Products of two tiles of rows with two of codes, `rounds` times over. Only with a token and all tiles shaped.
    pub(super) fn spin(rounds: usize) {
        if rounds == 0 {
            return;
        }
        // SAFETY: a token exists, so the instructions do.
        unsafe {
            asm_with_tiles!(
                "tilezero tmm4",
                "tilezero tmm5",
                "tilezero tmm6",
                "tilezero tmm7",
                "2:",
                "tdpbsud tmm0, tmm4, tmm6",
                "tdpbsud tmm2, tmm5, tmm6",
                "tdpbsud tmm1, tmm4, tmm7",
                "tdpbsud tmm3, tmm5, tmm7",
                "dec {rounds}",
                "jnz 2b",
                rounds = inout(reg) rounds => _,
            );
        }
    }

    /// Two vectors of codes with one or two tiles of x. A tile is loaded for the next step as soon as this one is
    /// through with it. The loop over steps has a loop over lines in it.
    macro_rules! pair {
        (
            $of:ident, $words:ident, $apart:ident,
            begin: [$($begin:literal)*], add: [$($add:literal)*], load: [$($load:literal)*],
            next: [$($next:literal)*], step: [$($step:literal)*], last: [$($last:literal)*],
            store: [$($store:literal)*]
        ) => {
            // SAFETY: `Tiles::multiply` has cut the operands to what the shape of the tiles reads and writes;
            // prefetching never faults. A token exists, so the instructions do.
            unsafe {
                asm_with_tiles!(
                    "test {add:e}, {add:e}",
                    "jnz 2f",
                    $($begin,)*
                    "jmp 3f",
                    "2:",
                    $($add,)*
                    "3:",
                    $($load,)*
                    "4:",
                    "mov {line}, {lines}",
                    "test {line}, {line}",
                    "jz 6f",
                    "5:",
                    "prefetcht1 [{ahead}]",
                    "add {ahead}, 64",
                    "dec {line}",
                    "jnz 5b",
                    "6:",
                    "dec {steps}",
                    "jz 8f",
                    "add {x}, 64 * {words}",
                    $($next,)*
                    "add {codes}, {next_step}",
                    // Steps come in runs, behind which more lies than a step.
                    "test {steps:e}, {run} - 1",
                    "jnz 7f",
                    "add {codes}, {next_run}",
                    "7:",
                    $($step,)*
                    "jmp 4b",
                    "8:",
                    $($last,)*
                    $($store,)*
                    x = inout(reg) $of.x.as_ptr() => _,
                    high = inout(reg) $of.x.as_ptr().wrapping_add($of.strip) => _,
                    row = in(reg) 4 * $words,
                    codes = inout(reg) $of.codes.as_ptr().wrapping_add(2 * $of.pair * if $apart { RUN } else { $words }) => _,
                    word = in(reg) 64 * if $apart { VECTORS * RUN } else { 1 },
                    products = in(reg) $of.products.as_mut_ptr().cast::<[u32; 16]>().wrapping_add(2 * $of.pair),
                    steps = inout(reg) $of.steps => _,
                    add = in(reg) u32::from($of.add),
                    ahead = inout(reg) $of.prefetch.from.cast::<u8>() => _,
                    lines = in(reg) $of.prefetch.lines,
                    line = out(reg) _,
                    words = const $words,
                    // Rows of products lie 256 bytes apart.
                    rows = const 64 / $words,
                    run = const RUN,
                    second = const 64 * if $apart { RUN } else { $words },
                    next_step = const 64 * if $apart { 1 } else { VECTORS * $words },
                    next_run = const 64 * if $apart { (16 * VECTORS - 1) * RUN } else { 0 },
                );
            }
        };
    }

    /// With steps of `WORDS` words, which lie `APART` or not, for more than 16 rows (`TALL`) or up to 16.
    #[inline(always)]
    pub(super) fn multiply<const WORDS: usize, const APART: bool, const TALL: bool>(of: Operands<'_>) {
        if of.steps == 0 {
            if !of.add {
                of.products.iter_mut().for_each(|row| row[2 * of.pair..][..2].fill([0; 16]));
            }
            return;
        }
        if TALL {
            pair!(
                of, WORDS, APART,
                begin: ["tilezero tmm0" "tilezero tmm1" "tilezero tmm2" "tilezero tmm3"],
                add: [
                    "tileloadd tmm0, [{products} + {rows} * {row}]"
                    "tileloadd tmm1, [{products} + {rows} * {row} + 64]"
                    "tileloadd tmm2, [{products} + {rows} * {row} + 4096]"
                    "tileloadd tmm3, [{products} + {rows} * {row} + 4160]"
                ],
                load: [
                    "tileloadd tmm4, [{x} + {row}]"
                    "tileloadd tmm6, [{codes} + {word}]"
                    "tileloadd tmm5, [{high} + {row}]"
                    "tileloadd tmm7, [{codes} + {word} + {second}]"
                ],
                next: ["add {high}, 64 * {words}"],
                step: [
                    "tdpbsud tmm0, tmm4, tmm6"
                    "tdpbsud tmm2, tmm5, tmm6"
                    "tdpbsud tmm1, tmm4, tmm7"
                    "tileloadd tmm6, [{codes} + {word}]"
                    "tileloadd tmm4, [{x} + {row}]"
                    "tdpbsud tmm3, tmm5, tmm7"
                    "tileloadd tmm5, [{high} + {row}]"
                    "tileloadd tmm7, [{codes} + {word} + {second}]"
                ],
                last: [
                    "tdpbsud tmm0, tmm4, tmm6"
                    "tdpbsud tmm2, tmm5, tmm6"
                    "tdpbsud tmm1, tmm4, tmm7"
                    "tdpbsud tmm3, tmm5, tmm7"
                ],
                store: [
                    "tilestored [{products} + {rows} * {row}], tmm0"
                    "tilestored [{products} + {rows} * {row} + 64], tmm1"
                    "tilestored [{products} + {rows} * {row} + 4096], tmm2"
                    "tilestored [{products} + {rows} * {row} + 4160], tmm3"
                ]
            );
        } else {
            pair!(
                of, WORDS, APART,
                begin: ["tilezero tmm0" "tilezero tmm1"],
                add: [
                    "tileloadd tmm0, [{products} + {rows} * {row}]"
                    "tileloadd tmm1, [{products} + {rows} * {row} + 64]"
                ],
                load: [
                    "tileloadd tmm4, [{x} + {row}]"
                    "tileloadd tmm6, [{codes} + {word}]"
                    "tileloadd tmm7, [{codes} + {word} + {second}]"
                ],
                next: ["/* {high} stays unused */"],
                step: [
                    "tdpbsud tmm0, tmm4, tmm6"
                    "tileloadd tmm6, [{codes} + {word}]"
                    "tdpbsud tmm1, tmm4, tmm7"
                    "tileloadd tmm4, [{x} + {row}]"
                    "tileloadd tmm7, [{codes} + {word} + {second}]"
                ],
                last: [
                    "tdpbsud tmm0, tmm4, tmm6"
                    "tdpbsud tmm1, tmm4, tmm7"
                ],
                store: [
                    "tilestored [{products} + {rows} * {row}], tmm0"
                    "tilestored [{products} + {rows} * {row} + 64], tmm1"
                ]
            );
        }
    }
}

/// No such unit: there is no token, so that nothing here is ever called.
#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
mod unit {
    use super::Operands;

    pub(super) fn granted() -> bool {
        false
    }

    pub(super) fn shape(_rows: usize, _words: usize) {}

    pub(super) fn release() {}

    pub(super) fn spin(_rounds: usize) {}

    pub(super) fn multiply<const WORDS: usize, const APART: bool, const TALL: bool>(of: Operands<'_>) {
        let Operands { x, strip, codes, pair, steps, add, products, prefetch: _ } = of;
        let order = if APART { super::Order::Apart } else { super::Order::Together { words: WORDS } };
        super::emulate(x, strip, codes, order, pair, steps, add, products);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where the CPU has no AMX, or none is granted, this tests its stand-in.
    #[test]
    fn products_of_every_shape_equal_plain_loops() {
        let amx = Amx::detect().unwrap();
        let byte = |i: usize| (i * 167 + i / 7 * 31) as u8;
        for order in [Order::Together { words: 8 }, Order::Together { words: 16 }, Order::Apart] {
            for rows in [1, 2, 15, 16, 17, 31, 32] {
                let words = order.words();
                let (steps, strip) = (16, 16 * 16 * words + 16);
                let x: Vec<[u8; 4]> =
                    (0..2 * strip).map(|i| [0, 1, 2, 3].map(|j| byte(4 * i + j) | 1)).collect();
                let codes: Vec<[u8; 64]> = (0..steps * VECTORS * words)
                    .map(|i| std::array::from_fn(|j| byte(64 * i + j + 5)))
                    .collect();
                let mut products = vec![[[7; 16]; VECTORS]; ROWS];
                let mut expected = products.clone();
                let tiles = amx.tiles(rows, order);
                let few = if order == Order::Apart { 8 } else { 3 };
                let calls = [(0, false, steps), (1, false, few), (0, true, few), (1, true, 0), (1, false, 0)];
                for (pair, add, steps) in calls {
                    let prefetch = Prefetch { from: codes.as_ptr().cast(), lines: rows % 3 };
                    tiles.multiply(&x, strip, &codes, pair, steps, add, &mut products, prefetch);
                    emulate(&x, strip, &codes, order, pair, steps, add, &mut expected[..rows]);
                }
                assert_eq!(products, expected, "rows={rows} {order:?}");
            }
        }
    }

    #[test]
    #[should_panic(expected = "one shape at a time")]
    fn tiles_of_a_thread_have_one_owner() {
        let amx = Amx::detect().unwrap();
        let order = Order::Together { words: 16 };
        let _first = amx.tiles(1, order);
        let _second = amx.tiles(2, order);
    }
}
