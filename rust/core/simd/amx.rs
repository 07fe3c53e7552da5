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
    /// The token, if there is one to have. Asks the system for permission, once.
    pub(crate) fn detect() -> Option<Self> {
        match unit::granted() {
            true => Some(Self { emulated: false }),
            false => cfg!(test).then_some(Self { emulated: true }),
        }
    }

    /// Shapes the tiles of this thread for blocks of `rows` rows of x, at most [`ROWS`], and steps of `words`
    /// words of four columns, 8 or 16.
    ///
    /// Panics if the thread has them in use already.
    pub(crate) fn tiles(self, rows: usize, words: usize) -> Tiles {
        assert!((1..=ROWS).contains(&rows) && (words == 8 || words == 16));
        assert!(!IN_USE.replace(true), "the tiles of a thread have one shape at a time");
        let tiles = Tiles { rows, words, emulated: self.emulated, thread: PhantomData };
        if !self.emulated {
            unit::shape(rows, words);
        }
        tiles
    }
}

thread_local! {
    /// Whether this thread has a [`Tiles`].
    static IN_USE: Cell<bool> = const { Cell::new(false) };
}

/// The tiles of this thread, shaped.
pub(crate) struct Tiles {
    rows: usize,
    words: usize,
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
    /// The products of some rows of x with a panel of codes: set, or added to what is there (`add`).
    ///
    /// * `x`: signed, `[step][row of 16][word]`; `strip` words behind it those of the rows from 16 on.
    /// * `codes`: `[step][vector][word]`, unsigned.
    /// * `products`: a row for each row of x.
    #[inline(always)]
    pub(crate) fn multiply(
        &self,
        x: &[[u8; 4]],
        strip: usize,
        codes: &[[u8; 64]],
        steps: usize,
        add: bool,
        products: &mut Products,
        prefetch: Prefetch,
    ) {
        let strips = (self.rows - 1) / 16;
        let x = &x[..strips * strip + steps * 16 * self.words];
        let codes = &codes[..steps * VECTORS * self.words];
        let products = &mut products[..self.rows];
        if cfg!(test) && self.emulated {
            return emulate(x, strip, codes, self.words, add, products);
        }
        let operands = Operands { x, strip, codes, steps, add, products, prefetch };
        match (self.words, self.rows > 16) {
            (16, true) => unit::multiply::<16, true>(operands),
            (16, false) => unit::multiply::<16, false>(operands),
            (_, true) => unit::multiply::<8, true>(operands),
            (_, false) => unit::multiply::<8, false>(operands),
        }
    }
}

/// Those of [`Tiles::multiply`], cut to what the shape of the tiles reads and writes.
struct Operands<'a> {
    x: &'a [[u8; 4]],
    strip: usize,
    codes: &'a [[u8; 64]],
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
    words: usize,
    add: bool,
    products: &mut Products,
) {
    for (row, products) in products.iter_mut().enumerate() {
        let x = |step| &x[row / 16 * strip + (16 * step + row % 16) * words..];
        for (c, sums) in products.iter_mut().enumerate() {
            if !add {
                *sums = [0; 16];
            }
            for (step, codes) in codes.chunks(VECTORS * words).enumerate() {
                for (q, codes) in x(step).iter().zip(&codes[c * words..][..words]) {
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
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod unit {
    use std::arch::asm;
    use std::arch::x86_64::{__cpuid_count, _xgetbv};
    use std::sync::LazyLock;

    use super::{Operands, VECTORS};
    use crate::simd::Aligned;

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

    /// Two vectors of codes with one or two tiles of x. The loop over steps has a loop over lines in it.
    macro_rules! pair {
        (
            $of:ident, $pair:ident, $words:ident,
            begin: [$($begin:literal)*], add: [$($add:literal)*], step: [$($step:literal)*],
            next: [$($next:literal)*], store: [$($store:literal)*]
        ) => {
            // SAFETY: `Tiles::multiply` has cut the operands to what the shape of the tiles reads and writes;
            // prefetching never faults. A token exists, so the instructions do.
            unsafe {
                asm!(
                    "test {add:e}, {add:e}",
                    "jnz 2f",
                    $($begin,)*
                    "jmp 3f",
                    "2:",
                    $($add,)*
                    "3:",
                    $($step,)*
                    "mov {line}, {lines}",
                    "test {line}, {line}",
                    "jz 5f",
                    "4:",
                    "prefetcht1 [{ahead}]",
                    "add {ahead}, 64",
                    "dec {line}",
                    "jnz 4b",
                    "5:",
                    "add {x}, 64 * {words}",
                    $($next,)*
                    "add {codes}, 64 * 4 * {words}",
                    "dec {steps}",
                    "jnz 3b",
                    $($store,)*
                    x = inout(reg) $of.x.as_ptr() => _,
                    high = inout(reg) $of.x.as_ptr().wrapping_add($of.strip) => _,
                    stride = in(reg) 4 * $words,
                    codes = inout(reg) $of.codes.as_ptr().wrapping_add(2 * $pair * $words) => _,
                    products = in(reg) $of.products.as_mut_ptr().cast::<[u32; 16]>().wrapping_add(2 * $pair),
                    line64 = in(reg) 64usize,
                    steps = inout(reg) $of.steps => _,
                    add = in(reg) u32::from($of.add),
                    ahead = inout(reg) $of.prefetch.from.wrapping_add($pair * $of.steps * $of.prefetch.lines * 64) => _,
                    lines = in(reg) $of.prefetch.lines,
                    line = out(reg) _,
                    words = const $words,
                    out("tmm0") _,
                    out("tmm1") _,
                    out("tmm2") _,
                    out("tmm3") _,
                    out("tmm4") _,
                    out("tmm5") _,
                    out("tmm6") _,
                    out("tmm7") _,
                    options(nostack),
                );
            }
        };
    }

    /// With steps of `WORDS` words, for more than 16 rows (`TALL`) or up to 16.
    #[inline(always)]
    pub(super) fn multiply<const WORDS: usize, const TALL: bool>(of: Operands<'_>) {
        if of.steps == 0 {
            if !of.add {
                of.products.fill([[0; 16]; VECTORS]);
            }
            return;
        }
        for pair in 0..VECTORS / 2 {
            if TALL {
                pair!(
                    of, pair, WORDS,
                    begin: ["tilezero tmm0" "tilezero tmm1" "tilezero tmm2" "tilezero tmm3"],
                    add: [
                        "tileloadd tmm0, [{products} + 4 * {line64}]"
                        "tileloadd tmm1, [{products} + 4 * {line64} + 64]"
                        "tileloadd tmm2, [{products} + 4 * {line64} + 4096]"
                        "tileloadd tmm3, [{products} + 4 * {line64} + 4160]"
                    ],
                    step: [
                        "tileloadd tmm6, [{codes} + {line64}]"
                        "tileloadd tmm4, [{x} + {stride}]"
                        "tdpbsud tmm0, tmm4, tmm6"
                        "tileloadd tmm7, [{codes} + {line64} + 64 * {words}]"
                        "tdpbsud tmm1, tmm4, tmm7"
                        "tileloadd tmm5, [{high} + {stride}]"
                        "tdpbsud tmm2, tmm5, tmm6"
                        "tdpbsud tmm3, tmm5, tmm7"
                    ],
                    next: ["add {high}, 64 * {words}"],
                    store: [
                        "tilestored [{products} + 4 * {line64}], tmm0"
                        "tilestored [{products} + 4 * {line64} + 64], tmm1"
                        "tilestored [{products} + 4 * {line64} + 4096], tmm2"
                        "tilestored [{products} + 4 * {line64} + 4160], tmm3"
                    ]
                );
            } else {
                pair!(
                    of, pair, WORDS,
                    begin: ["tilezero tmm0" "tilezero tmm1"],
                    add: [
                        "tileloadd tmm0, [{products} + 4 * {line64}]"
                        "tileloadd tmm1, [{products} + 4 * {line64} + 64]"
                    ],
                    step: [
                        "tileloadd tmm6, [{codes} + {line64}]"
                        "tileloadd tmm4, [{x} + {stride}]"
                        "tdpbsud tmm0, tmm4, tmm6"
                        "tileloadd tmm7, [{codes} + {line64} + 64 * {words}]"
                        "tdpbsud tmm1, tmm4, tmm7"
                    ],
                    next: ["/* {high} stays unused */"],
                    store: [
                        "tilestored [{products} + 4 * {line64}], tmm0"
                        "tilestored [{products} + 4 * {line64} + 64], tmm1"
                    ]
                );
            }
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

    pub(super) fn multiply<const WORDS: usize, const TALL: bool>(of: Operands<'_>) {
        let Operands { x, strip, codes, steps: _, add, products, prefetch: _ } = of;
        super::emulate(x, strip, codes, WORDS, add, products);
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
        for words in [8, 16] {
            for rows in [1, 2, 15, 16, 17, 31, 32] {
                let (steps, strip) = (3, 3 * 16 * words + 16);
                let x: Vec<[u8; 4]> =
                    (0..2 * strip).map(|i| [0, 1, 2, 3].map(|j| byte(4 * i + j) | 1)).collect();
                let codes: Vec<[u8; 64]> = (0..steps * VECTORS * words)
                    .map(|i| std::array::from_fn(|j| byte(64 * i + j + 5)))
                    .collect();
                let mut products = vec![[[7; 16]; VECTORS]; ROWS];
                let mut expected = products.clone();
                let tiles = amx.tiles(rows, words);
                for (add, steps) in [(false, steps), (true, 2), (true, 0)] {
                    let prefetch = Prefetch { from: codes.as_ptr().cast(), lines: rows % 3 };
                    tiles.multiply(&x, strip, &codes, steps, add, &mut products, prefetch);
                    let codes = &codes[..steps * 4 * words];
                    emulate(&x, strip, codes, words, add, &mut expected[..rows]);
                }
                assert_eq!(products, expected, "rows={rows} words={words}");
            }
        }
    }

    #[test]
    #[should_panic(expected = "one shape at a time")]
    fn tiles_of_a_thread_have_one_owner() {
        let amx = Amx::detect().unwrap();
        let _first = amx.tiles(1, 16);
        let _second = amx.tiles(2, 16);
    }
}
