//! Both kernels against plain loops, bit for bit, on every instruction set and for 1, 2 and 7 threads.

use half::{bf16, f16};

use super::*;
use crate::quantize::{ScalesMut, ZeroPointsMut};
use crate::reference::sum;
use crate::scheme::{ScaleDtype, ScaleRule};

#[test]
fn small_work_is_one_part_whatever_the_threads() {
    for (m, n, k) in [(1, 64, 64), (1, 512, 512), (4, 256, 256)] {
        let mut out = vec![0.0; m * n];
        assert_eq!(
            cut(Columns::of(Target::F32(&mut out), n), m, n, k, MAX_ROWS, 1, PARTS_A_THREAD, 16).len(),
            1,
            "{m} {n} {k}"
        );
    }
}

/// A packed matrix of random bits with everything to read it.
struct Matrix {
    shape: Shape,
    scheme: Scheme,
    rounding: Rounding,
    planes: Planes,
    read_bits: u32,
    packed: Vec<u8>,
    scales: Vec<u16>,
    zeros_u8: Vec<u8>,
    zeros_f32: Vec<f32>,
}

/// A small linear congruential generator: the tests need variety, not quality.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as u32
    }

    fn below(&mut self, n: usize) -> usize {
        self.next() as usize % n
    }

    /// −1 … 1, now and then scaled far up or down.
    fn real(&mut self) -> f32 {
        let x = self.next() as f32 / (1u32 << 30) as f32 - 1.0;
        if self.below(50) == 0 { x * 1e3 } else { x }
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }
}

impl Matrix {
    fn new(random: &mut Random, shape: Shape, scheme: Scheme, widths: &[u32], read_bits: u32) -> Self {
        let planes = Planes::for_scheme(widths, &scheme).unwrap();
        let mut packed: Vec<u8> =
            (0..planes.nbytes(shape.rows, shape.k)).map(|_| random.next() as u8).collect();
        if planes == Planes::BYTES {
            packed.iter_mut().for_each(|code| *code &= (u32::MAX >> (32 - scheme.bits())) as u8);
        }
        let groups = shape.rows * scheme.groups(shape.k);
        let scales = (0..groups).map(|_| bf16::from_f32(random.real()).to_bits()).collect();
        let zeros = if scheme.symmetric() { 0 } else { groups };
        let zeros_u8 = (0..zeros).map(|_| random.below(1 << scheme.bits()) as u8).collect();
        let rounding = Rounding::nearest();
        Self { shape, scheme, rounding, planes, read_bits, packed, scales, zeros_u8, zeros_f32: Vec::new() }
    }

    fn zero_points(&self) -> ZeroPoints<'_> {
        match (self.zeros_u8.is_empty(), self.zeros_f32.is_empty()) {
            (true, true) => ZeroPoints::Constant,
            (false, _) => ZeroPoints::U8(&self.zeros_u8),
            _ => ZeroPoints::F32(&self.zeros_f32),
        }
    }

    fn rows(&self) -> Rows<'_> {
        Rows {
            packed: &self.packed,
            scales: Scales::Bf16(&self.scales),
            zero_points: self.zero_points(),
            shape: self.shape,
            scheme: self.scheme,
            rounding: self.rounding,
            prefix: readable(&self.scheme, &self.rounding, &self.planes, self.read_bits).unwrap(),
            read_bits: self.read_bits,
        }
    }

    /// Code of the planes read, field by field.
    fn code(&self, row: usize, column: usize) -> i64 {
        let (mut code, mut plane, mut read) = (0, 0, 0);
        for width in self.planes.widths() {
            let row_bytes = self.shape.k.div_ceil(8 / *width as usize);
            if read < self.read_bits {
                let bit = column * *width as usize;
                let byte = self.packed[plane + row * row_bytes + bit / 8];
                code = code << width | i64::from(byte >> (bit % 8)) & ((1 << width) - 1);
                read += width;
            }
            plane += self.shape.rows * row_bytes;
        }
        match self.scheme.table() {
            Some(table) => i64::from(table.levels()[(code as usize).min(table.levels().len() - 1)]),
            None => code,
        }
    }

    /// Twice the zero point of a group.
    fn twice_zero(&self, group: usize) -> i64 {
        match self.scheme.zero_point() {
            Some(z) => (2.0 * z) as i64,
            None => 2 * i64::from(self.zeros_u8[group]),
        }
    }

    /// The integer matmul as the contract words it.
    fn int8(&self, x: &[f32], m: usize, bias: Option<&[f32]>) -> Vec<f32> {
        let Shape { rows: n, k } = self.shape;
        let size = self.scheme.group_len(k);
        let dropped = self.scheme.bits() - self.read_bits;
        let mut out = Vec::new();
        for row in 0..m {
            let x = &x[row * k..][..k];
            if !x.iter().all(|x| x.is_finite()) {
                out.extend(vec![f32::NAN; n]);
                continue;
            }
            for column in 0..n {
                let mut acc = 0.0f32;
                for group in 0..k.div_ceil(size) {
                    let (begin, end) = (group * size, k.min((group + 1) * size));
                    let largest = x[begin..end].iter().fold(0.0f32, |m, x| m.max(x.abs()));
                    let s_x = if largest / 127.0 < f32::MIN_POSITIVE { 0.0 } else { largest / 127.0 };
                    let number = column * k.div_ceil(size) + group;
                    let s_r = f32::from_bits(u32::from(self.scales[number]) << 16) * (1 << dropped) as f32;
                    for low in (begin..end).step_by(32768) {
                        let mut bracket = 0i64;
                        for i in low..end.min(low + 32768) {
                            let q =
                                if s_x == 0.0 { 0 } else { (x[i] * (1.0 / s_x)).round_ties_even() as i64 };
                            let weight = (2 << dropped) * self.code(column, i)
                                - (self.twice_zero(number) - ((1 << dropped) - 1));
                            bracket += weight * q;
                        }
                        let bracket = bracket as f32 / (2 << dropped) as f32;
                        acc = (s_r * s_x).mul_add(bracket, acc);
                    }
                }
                let finite = x.iter().all(|x| x.is_finite());
                let y = bias.map_or(acc, |bias| acc + bias[column]);
                out.push(if finite { y } else { f32::NAN });
            }
        }
        out
    }

    /// The float matmul of codes: segments of at most 256 columns of a group; of each the sum of products of codes
    /// with x, scaled by a power of two, fused four columns at a time in the order 2, 0, 3, 1.
    fn float(&self, x: &[f32], m: usize, bias: Option<&[f32]>) -> Vec<f32> {
        let Shape { rows: n, k } = self.shape;
        let group_len = self.scheme.group_len(k);
        let groups = k.div_ceil(group_len.max(1));
        let dropped = self.scheme.bits() - self.read_bits;
        let mut out = Vec::new();
        for row in 0..m {
            let x = &x[row * k..][..k];
            if !x.iter().all(|x| x.is_finite()) {
                out.extend(vec![f32::NAN; n]);
                continue;
            }
            for column in 0..n {
                let mut acc = 0.0f32;
                for group in 0..groups {
                    let (begin, end) = (group * group_len, k.min((group + 1) * group_len));
                    let largest = x[begin..end].iter().fold(0.0f32, |a, x| a.max(x.abs()));
                    let power = f32::from_bits(largest.to_bits() & 0x7f80_0000);
                    let at = column * groups + group;
                    let scale = bf16::from_bits(self.scales[at]).to_f32() * (1u32 << dropped) as f32 * power;
                    let twice = self.twice_zero(at) as f32 - ((1u32 << dropped) - 1) as f32;
                    let zero = twice / (2u32 << dropped) as f32;
                    for begin in (begin..end).step_by(256) {
                        let scaled: Vec<f32> = x[begin..end.min(begin + 256)]
                            .iter()
                            .map(|x| if power == 0.0 { 0.0 } else { x / power })
                            .map(|x| if x.abs() < 2f32.powi(-100) { 0.0 } else { x })
                            .collect();
                        let mut dot = 0.0f32;
                        for (i, x) in scaled.chunks(4).enumerate() {
                            for j in [2, 0, 3, 1].into_iter().filter(|j| *j < x.len()) {
                                dot = x[j].mul_add(self.code(column, begin + 4 * i + j) as f32, dot);
                            }
                        }
                        let bracket = zero.mul_add(-sum(scaled.iter().copied()), dot);
                        acc = scale.mul_add(bracket, acc);
                    }
                }
                out.push(bias.map_or(acc, |bias| acc + bias[column]));
            }
        }
        out
    }

    /// The float matmul of dequantized values: runs of 64 columns, fused in index order, then added in order.
    fn values(&self, x: &[f32], m: usize, bias: Option<&[f32]>) -> Vec<f32> {
        let Shape { rows: n, k } = self.shape;
        let mut weight = vec![0.0; n * k];
        let (scales, zeros) = (Scales::Bf16(&self.scales), self.zero_points());
        let (scheme, rounding) = (&self.scheme, &self.rounding);
        let out = Target::F32(&mut weight);
        crate::unpack(
            &self.packed,
            scales,
            zeros,
            self.shape,
            scheme,
            rounding,
            &self.planes,
            self.read_bits,
            out,
            1,
        )
        .unwrap();
        let mut out = Vec::new();
        for row in 0..m {
            for column in 0..n {
                let pairs: Vec<_> = (0..k).map(|i| (x[row * k + i], weight[column * k + i])).collect();
                let run = |pairs: &[(f32, f32)]| pairs.iter().fold(0.0f32, |acc, (x, w)| x.mul_add(*w, acc));
                let finite = pairs.iter().all(|(x, _)| x.is_finite());
                let start = if finite { 0.0 } else { f32::NAN };
                let sum = pairs.chunks(64).fold(start, |sum, pairs| sum + run(pairs));
                out.push(bias.map_or(sum, |bias| sum + bias[column]));
            }
        }
        out
    }

    /// The integer kernel on two threads, without a bias.
    fn run(&self, token: Token, x: Source<'_>, m: usize, out: Target<'_>) {
        matmul_on(token, x, m, &self.rows(), Layout::Canonical, None, Activations::Int8, out, 2).unwrap();
    }

    /// Runs the kernel on everything there is and compares bits.
    fn check(&self, x: &[f32], m: usize, bias: Option<&[f32]>, how: Activations) {
        let expected = match how {
            Activations::Int8 => self.int8(x, m, bias),
            Activations::Float if !has_integer_form(&self.rounding) => self.values(x, m, bias),
            Activations::Float => self.float(x, m, bias),
        };
        let expected: Vec<u32> = expected.iter().map(|y| canonical(*y)).collect();
        let panels = self.panels();
        let panels = panels.as_ref().map(Panels::rows);
        let rows = self.rows();
        for token in Token::available() {
            for (layout, weight) in [(Layout::Canonical, Some(&rows)), (Layout::Panels, panels.as_ref())] {
                let Some(weight) = weight else { continue };
                for threads in [1, 2, 7] {
                    let mut out = vec![f32::INFINITY; m * self.shape.rows];
                    let target = Target::F32(&mut out);
                    matmul_on(token, Source::F32(x), m, weight, layout, bias, how, target, threads).unwrap();
                    let got: Vec<u32> = out.iter().map(|y| canonical(*y)).collect();
                    assert!(
                        got == expected,
                        "{} {layout:?} threads={threads} m={m} {:?} {:?} {:?} read={} {how:?}: first difference \
                         at {:?}",
                        token.name(),
                        self.shape,
                        self.scheme,
                        self.planes,
                        self.read_bits,
                        (0..got.len()).find(|i| got[*i] != expected[*i]),
                    );
                }
            }
        }
    }

    /// The same matrix in the compute layout, unless its codes go by their position.
    fn panels(&self) -> Option<Panels<'_>> {
        if self.rounding.mode() == Mode::Subtractive {
            return None;
        }
        let groups = self.shape.rows.next_multiple_of(LANES) * self.scheme.groups(self.shape.k);
        let mut panels = Panels {
            of: self,
            packed: vec![0; panels_nbytes(self.shape, &self.scheme, &self.planes)],
            scales: vec![0; groups],
            zeros_u8: vec![0; if self.zeros_u8.is_empty() { 0 } else { groups }],
            zeros_f32: vec![0.0; if self.zeros_f32.is_empty() { 0 } else { groups }],
        };
        let zeros = match self.zero_points() {
            ZeroPoints::Constant => ZeroPointsMut::Constant,
            ZeroPoints::U8(_) => ZeroPointsMut::U8(&mut panels.zeros_u8),
            ZeroPoints::F32(_) => ZeroPointsMut::F32(&mut panels.zeros_f32),
        };
        let (scales, packed) = (ScalesMut::Bf16(&mut panels.scales), &mut panels.packed);
        to_panels(
            &self.packed,
            Scales::Bf16(&self.scales),
            self.zero_points(),
            self.shape,
            &self.scheme,
            &self.planes,
            packed,
            scales,
            zeros,
            2,
        )
        .unwrap();
        Some(panels)
    }
}

/// A [`Matrix`] in the compute layout.
struct Panels<'a> {
    of: &'a Matrix,
    packed: Vec<u8>,
    scales: Vec<u16>,
    zeros_u8: Vec<u8>,
    zeros_f32: Vec<f32>,
}

impl Panels<'_> {
    fn rows(&self) -> Rows<'_> {
        let zero_points = match self.of.zero_points() {
            ZeroPoints::Constant => ZeroPoints::Constant,
            ZeroPoints::U8(_) => ZeroPoints::U8(&self.zeros_u8),
            ZeroPoints::F32(_) => ZeroPoints::F32(&self.zeros_f32),
        };
        Rows { packed: &self.packed, scales: Scales::Bf16(&self.scales), zero_points, ..self.of.rows() }
    }
}

/// Bits, all NaN alike.
fn canonical(y: f32) -> u32 {
    if y.is_nan() { f32::NAN.to_bits() } else { y.to_bits() }
}

fn scheme(bits: u32, group_size: usize, symmetric: bool, nested: bool, table: &[u8]) -> Scheme {
    Scheme::new(bits, group_size, symmetric, nested, table, ScaleRule::Extreme, ScaleDtype::Bf16).unwrap()
}

fn values(random: &mut Random, len: usize) -> Vec<f32> {
    (0..len).map(|_| random.real()).collect()
}

/// Bits, symmetric, nested, level table, planes, bits read.
type Reading = (u32, bool, bool, &'static [u8], Vec<u32>, u32);

/// Every way to store and read codes.
fn readings() -> Vec<Reading> {
    const TABLE: &[u8] = &[1, 40, 77, 100, 128, 150, 190, 201, 222, 255];
    let mut all = Vec::new();
    for bits in 1..=8 {
        let fixed = Planes::of_bits(bits);
        for symmetric in [true, false] {
            if bits == 1 && !symmetric {
                continue;
            }
            for read in fixed.prefixes() {
                all.push((bits, symmetric, false, &[][..], fixed.widths().to_vec(), read));
            }
            all.push((bits, symmetric, false, &[][..], vec![8], bits));
        }
    }
    for widths in [&[4, 4][..], &[4, 1, 1, 2], &[2, 1, 1, 1, 1, 2]] {
        for read in Planes::new(widths).unwrap().prefixes() {
            all.push((8, true, true, &[][..], widths.to_vec(), read));
        }
    }
    all.push((4, true, false, TABLE, vec![4], 4));
    all.push((3, true, false, &TABLE[..8], vec![2, 1], 3));
    all.push((4, true, false, TABLE, vec![8], 4));
    all
}

#[test]
fn int8_equals_the_plain_loop_for_every_reading_and_size() {
    let mut random = Random(1);
    for (bits, symmetric, nested, table, widths, read) in readings() {
        for _ in 0..6 {
            let m = random.pick(&[1, 2, 3, 4, 5, 6, 7, 11, 13]);
            let n = random.pick(&[1, 15, 16, 17, 33, 63, 64, 65, 81]);
            let k = random.pick(&[1, 7, 31, 32, 33, 63, 64, 65, 130, 200]);
            let group = random.pick(&[0, 8, 9, 12, 30, 32, 64, 96, 100]);
            let scheme = scheme(bits, group, symmetric, nested, table);
            let matrix = Matrix::new(&mut random, Shape { rows: n, k }, scheme, &widths, read);
            let (x, bias) = (values(&mut random, m * k), values(&mut random, n));
            matrix.check(&x, m, (m > 2).then_some(&bias[..]), Activations::Int8);
        }
    }
}

#[test]
fn few_rows_against_whole_panels_equal_the_plain_loop_for_every_reading() {
    let mut random = Random(12);
    for (bits, symmetric, nested, table, widths, read) in readings() {
        let scheme = scheme(bits, random.pick(&[0, 32, 64]), symmetric, nested, table);
        let shape = Shape { rows: 128, k: random.pick(&[64, 160, 190]) };
        let matrix = Matrix::new(&mut random, shape, scheme, &widths, read);
        for m in [1, 2, 4, 7] {
            let x = values(&mut random, m * shape.k);
            matrix.check(&x, m, None, Activations::Int8);
            matrix.check(&x, m, None, Activations::Float);
        }
    }
}

#[test]
fn int8_of_several_blocks_and_threads_equals_the_plain_loop() {
    let mut random = Random(2);
    for (k, group, m) in [(2500, 64, 9), (2500, 9, 3), (3000, 0, 6), (2112, 24, 5)] {
        for (bits, symmetric) in [(4, false), (8, true)] {
            let scheme = scheme(bits, group, symmetric, false, &[]);
            let widths = [bits];
            let matrix = Matrix::new(&mut random, Shape { rows: 150, k }, scheme, &widths, bits);
            let x = values(&mut random, m * k);
            matrix.check(&x, m, None, Activations::Int8);
        }
    }
}

#[test]
fn int8_of_many_rows_equals_the_plain_loop() {
    let mut random = Random(11);
    let readings = readings();
    // Whole and broken strips and panels; segments that share, fill, straddle and pad the steps of a matrix unit.
    for m in [15, 16, 17, 31, 32, 33, 48, 65] {
        for (k, group) in [(64, 32), (200, 96), (330, 64), (1100, 0), (1300, 640), (700, 128), (90, 24)] {
            let (bits, symmetric, nested, table, widths, read) = &readings[random.below(readings.len())];
            let scheme = scheme(*bits, group, *symmetric, *nested, table);
            let shape = Shape { rows: random.pick(&[64, 80, 128]), k };
            let matrix = Matrix::new(&mut random, shape, scheme, widths, *read);
            let (mut x, bias) = (values(&mut random, m * k), values(&mut random, shape.rows));
            x[random.below(m * k)] = random.pick(&[1.0, f32::NAN]);
            matrix.check(&x, m, Some(&bias), Activations::Int8);
        }
    }
}

#[test]
fn int8_of_many_rows_against_bytes_in_place_equals_the_plain_loop() {
    let mut random = Random(13);
    // Runs of 512 columns; more than a block of them; panels that are not whole.
    for (k, group, m) in [(512, 0, 16), (1536, 512, 33), (4608, 0, 40)] {
        let scheme = scheme(8, group, true, false, &[]);
        let shape = Shape { rows: random.pick(&[80, 144]), k };
        let matrix = Matrix::new(&mut random, shape, scheme, &[8], 8);
        let x = values(&mut random, m * k);
        matrix.check(&x, m, None, Activations::Int8);
    }
}

#[test]
fn int8_does_not_overflow_in_rows_longer_than_a_segment() {
    let mut random = Random(3);
    let shape = Shape { rows: 2, k: 70_001 };
    for (symmetric, code) in [(true, 255), (true, 0), (false, 255)] {
        let mut matrix = Matrix::new(&mut random, shape, scheme(8, 0, symmetric, false, &[]), &[8], 8);
        matrix.packed.fill(code);
        matrix.zeros_u8.fill(0);
        matrix.check(&vec![1.0; shape.k], 1, None, Activations::Int8);
    }
}

#[test]
fn int8_is_exact_where_every_product_is_the_largest() {
    let mut random = Random(13);
    for (bits, symmetric, nested, table, widths, read) in readings() {
        // Segments of one word, of a unit and a word more, of a block and more.
        for (k, group, m) in [(4, 0, 1), (36, 0, 5), (200, 32, 4), (160, 64, 9), (4200, 0, 3)] {
            let shape = Shape { rows: 64, k };
            let scheme = scheme(bits, group, symmetric, nested, table);
            let mut matrix = Matrix::new(&mut random, shape, scheme, &widths, read);
            let largest = if widths == [8] { (u32::MAX >> (32 - bits)) as u8 } else { u8::MAX };
            matrix.packed.fill(largest);
            // All of one sign, and of two in every pattern within a word.
            let x: Vec<f32> =
                (0..m * k).map(|i| if (i / k) >> (i % 4) & 1 == 0 { 1.0 } else { -1.0 }).collect();
            matrix.check(&x, m, None, Activations::Int8);
        }
    }
}

#[test]
fn rows_that_are_not_finite_give_rows_of_nan_and_zero_rows_give_the_bias() {
    let mut random = Random(4);
    let matrix =
        Matrix::new(&mut random, Shape { rows: 20, k: 70 }, scheme(4, 32, true, false, &[]), &[4], 4);
    let bias = values(&mut random, 20);
    let mut x = values(&mut random, 6 * 70);
    x[69] = f32::NAN;
    x[70] = f32::INFINITY;
    x[3 * 70 - 1] = f32::NEG_INFINITY;
    x[3 * 70..4 * 70].fill(0.0);
    x[4 * 70..5 * 70].fill(1e-39);
    x[5 * 70] = 3e38;
    matrix.check(&x, 6, Some(&bias), Activations::Int8);
    matrix.check(&x, 6, Some(&bias), Activations::Float);
    let mut rescaled =
        Matrix::new(&mut random, Shape { rows: 20, k: 70 }, scheme(4, 32, true, false, &[]), &[4], 4);
    rescaled.rounding = Rounding::new(Mode::Iid, 9, 0, 0, 16, 1.0, true, 0).unwrap();
    rescaled.zeros_f32 = values(&mut random, rescaled.scales.len());
    rescaled.check(&x, 6, Some(&bias), Activations::Float);
    let mut out = vec![0.0; 6 * 20];
    let token = Token::active();
    matmul_on(
        token,
        Source::F32(&x),
        6,
        &matrix.rows(),
        Layout::Canonical,
        Some(&bias),
        Activations::Int8,
        Target::F32(&mut out),
        1,
    )
    .unwrap();
    assert!(out[..60].iter().all(|y| y.to_bits() == f32::NAN.to_bits()));
    assert_eq!(out[60..80], bias);
    assert_eq!(out[80..100], bias);
}

#[test]
fn float_equals_the_plain_loop() {
    let mut random = Random(5);
    for (bits, symmetric, nested, table, widths, read) in readings() {
        for _ in 0..2 {
            let m = random.pick(&[1, 2, 4, 5, 9]);
            let n = random.pick(&[1, 16, 17, 33]);
            let k = random.pick(&[1, 63, 64, 65, 130]);
            let group = random.pick(&[0, 8, 9, 32, 64]);
            let scheme = scheme(bits, group, symmetric, nested, table);
            let matrix = Matrix::new(&mut random, Shape { rows: n, k }, scheme, &widths, read);
            let (x, bias) = (values(&mut random, m * k), values(&mut random, n));
            matrix.check(&x, m, (m > 2).then_some(&bias[..]), Activations::Float);
        }
    }
}

#[test]
fn float_of_several_blocks_and_many_panels_equals_the_plain_loop() {
    let mut random = Random(16);
    let readings = readings();
    // Tiles and blocks of every height and length, more panels than are taken together, one that is not whole;
    // segments that fill, straddle and share a block.
    for m in [5, 8, 13, 24, 25, 47] {
        for (k, group, n) in [(320, 0, 80), (300, 96, 64), (530, 128, 144), (140, 9, 33), (70, 32, 1100)] {
            let (bits, symmetric, nested, table, widths, read) = &readings[random.below(readings.len())];
            let scheme = scheme(*bits, group, *symmetric, *nested, table);
            let matrix = Matrix::new(&mut random, Shape { rows: n, k }, scheme, widths, *read);
            let (mut x, bias) = (values(&mut random, m * k), values(&mut random, n));
            x[random.below(m * k)] = random.pick(&[1.0, f32::NAN]);
            matrix.check(&x, m, Some(&bias), Activations::Float);
        }
    }
}

#[test]
fn float_gives_the_same_bits_for_the_same_numbers_of_any_type() {
    let mut random = Random(15);
    for (bits, symmetric, nested, table, widths, read) in readings() {
        let (m, n, k) =
            (random.pick(&[1, 2, 7, 14]), random.pick(&[16, 64, 70]), random.pick(&[64, 130, 1500]));
        let group = random.pick(&[0, 32, 64, 100]);
        let scheme = scheme(bits, group, symmetric, nested, table);
        let matrix = Matrix::new(&mut random, Shape { rows: n, k }, scheme, &widths, read);
        let bf16s: Vec<bf16> = values(&mut random, m * k).iter().map(|x| bf16::from_f32(*x)).collect();
        let x: Vec<f32> = bf16s.iter().map(|x| x.to_f32()).collect();
        let expected = matrix.float(&x, m, None);
        for token in Token::available() {
            for panels in [None, matrix.panels()] {
                let rows = matrix.rows();
                let panels = panels.as_ref().map(Panels::rows);
                let layout = panels.as_ref().map_or(Layout::Canonical, |_| Layout::Panels);
                let weight = panels.as_ref().unwrap_or(&rows);
                let mut out = vec![0.0f32; m * n];
                let (x, to) = (Source::Bf16(&bf16s), Target::F32(&mut out));
                matmul_on(token, x, m, weight, layout, None, Activations::Float, to, 2).unwrap();
                assert!(
                    out.iter().zip(&expected).all(|(y, e)| canonical(*y) == canonical(*e)),
                    "{} {layout:?} m={m} n={n} k={k} {scheme:?} read={read}",
                    token.name()
                );
            }
        }
    }
}

#[test]
fn float_takes_weights_without_an_integer_form_and_int8_refuses_them() {
    let mut random = Random(6);
    let shape = Shape { rows: 40, k: 300 };
    for (mode, preserve) in [(Mode::Subtractive, false), (Mode::Iid, true)] {
        let mut matrix = Matrix::new(&mut random, shape, scheme(4, 64, true, false, &[]), &[4], 4);
        matrix.rounding = Rounding::new(mode, 9, 0, 0, 16, 1.0, preserve, 1000).unwrap();
        if preserve {
            matrix.zeros_f32 = values(&mut random, matrix.scales.len());
        }
        let x = values(&mut random, 5 * shape.k);
        matrix.check(&x, 5, None, Activations::Float);
        let mut out = vec![0.0; 5 * 40];
        let target = Target::F32(&mut out);
        let result = matmul_on(
            Token::active(),
            Source::F32(&x),
            5,
            &matrix.rows(),
            Layout::Canonical,
            None,
            Activations::Int8,
            target,
            1,
        );
        assert!(result.unwrap_err().to_string().contains("activations=\"float\""));
    }
}

#[test]
fn empty_products_are_the_bias_or_nothing() {
    let mut random = Random(7);
    let bias = values(&mut random, 17);
    for how in [Activations::Int8, Activations::Float] {
        let scheme = scheme(4, 64, true, false, &[]);
        let none = Matrix::new(&mut random, Shape { rows: 17, k: 0 }, scheme, &[4], 4);
        none.check(&[], 3, Some(&bias), how);
        let matrix = Matrix::new(&mut random, Shape { rows: 17, k: 64 }, scheme, &[4], 4);
        matrix.check(&[], 0, Some(&bias), how);
        let empty = Matrix::new(&mut random, Shape { rows: 0, k: 64 }, scheme, &[4], 4);
        empty.check(&values(&mut random, 64), 1, None, how);
    }
}

#[test]
fn every_type_of_input_and_output_is_rounded_once() {
    let mut random = Random(8);
    let (m, shape) = (5, Shape { rows: 21, k: 77 });
    let matrix = Matrix::new(&mut random, shape, scheme(5, 16, false, false, &[]), &[4, 1], 5);
    let x = values(&mut random, m * shape.k);
    let bf16s: Vec<bf16> = x.iter().map(|x| bf16::from_f32(*x)).collect();
    let f16s: Vec<f16> = x.iter().map(|x| f16::from_f32(*x)).collect();
    let f64s: Vec<f64> = x.iter().map(|x| f64::from(*x) * (1.0 + 1e-12)).collect();
    let from_bf16: Vec<f32> = bf16s.iter().map(|x| x.to_f32()).collect();
    let from_f16: Vec<f32> = f16s.iter().map(|x| x.to_f32()).collect();
    let from_f64: Vec<f32> = f64s.iter().map(|x| *x as f32).collect();
    for token in Token::available() {
        let len = m * shape.rows;
        let mut out = vec![bf16::ZERO; len];
        matrix.run(token, Source::Bf16(&bf16s), m, Target::Bf16(&mut out));
        assert!(out.iter().zip(matrix.int8(&from_bf16, m, None)).all(|(y, e)| *y == bf16::from_f32(e)));
        let mut out = vec![f16::ZERO; len];
        matrix.run(token, Source::F16(&f16s), m, Target::F16(&mut out));
        assert!(out.iter().zip(matrix.int8(&from_f16, m, None)).all(|(y, e)| *y == f16::from_f32(e)));
        let mut out = vec![0.0f64; len];
        matrix.run(token, Source::F64(&f64s), m, Target::F64(&mut out));
        assert!(out.iter().zip(matrix.int8(&from_f64, m, None)).all(|(y, e)| *y == f64::from(e)));
    }
}

#[test]
fn wrong_lengths_are_refused_with_the_numbers() {
    let mut random = Random(9);
    let matrix = Matrix::new(&mut random, Shape { rows: 4, k: 64 }, scheme(4, 64, true, false, &[]), &[4], 4);
    let token = Token::active();
    let run = |x: usize, bias: usize, out: usize| {
        let (x, bias, mut out) = (vec![0.0; x], vec![0.0; bias], vec![0.0; out]);
        let target = Target::F32(&mut out);
        let (x, bias, how) = (Source::F32(&x), Some(&bias[..]), Activations::Int8);
        matmul_on(token, x, 2, &matrix.rows(), Layout::Canonical, bias, how, target, 1)
    };
    assert!(run(128, 4, 8).is_ok());
    for (x, bias, out, name) in
        [(127, 4, 8, "x has 127"), (128, 3, 8, "bias has 3"), (128, 4, 9, "out has 9")]
    {
        assert!(run(x, bias, out).unwrap_err().to_string().contains(name));
    }
}

#[test]
fn the_compute_layout_gives_the_canonical_one_back() {
    let mut random = Random(10);
    for (bits, symmetric, nested, table, widths, read) in readings() {
        for (n, k, group) in
            [(1, 1, 8), (63, 70, 9), (64, 128, 32), (81, 2500, 64), (130, 200, 12), (0, 8, 8)]
        {
            let scheme = scheme(bits, group, symmetric, nested, table);
            let shape = Shape { rows: n, k };
            let mut matrix = Matrix::new(&mut random, shape, scheme, &widths, read);
            // Canonical rows end in zero bits.
            let mut codes = vec![0; n * k];
            crate::unpack_codes(&matrix.packed, shape, &matrix.planes, matrix.planes.bits(), &mut codes, 1)
                .unwrap();
            crate::pack_codes(&codes, shape, &matrix.planes, &mut matrix.packed, 1).unwrap();
            let panels = matrix.panels().unwrap();
            let (mut packed, mut scales, mut zeros) =
                (vec![1; matrix.packed.len()], vec![1; matrix.scales.len()], vec![1; matrix.zeros_u8.len()]);
            let zero_points =
                if zeros.is_empty() { ZeroPointsMut::Constant } else { ZeroPointsMut::U8(&mut zeros) };
            from_panels(
                &panels.packed,
                Scales::Bf16(&panels.scales),
                panels.rows().zero_points,
                shape,
                &matrix.scheme,
                &matrix.planes,
                &mut packed,
                ScalesMut::Bf16(&mut scales),
                zero_points,
                2,
            )
            .unwrap();
            assert!(
                packed == matrix.packed && scales == matrix.scales && zeros == matrix.zeros_u8,
                "{shape:?} {scheme:?}"
            );
        }
    }
}

#[test]
fn refined_rows_are_those_of_a_product_at_their_bits() {
    let mut random = Random(11);
    for (m, n, k, group) in [(1, 33, 70, 32), (5, 70, 96, 0), (40, 130, 130, 64)] {
        let scheme = scheme(8, group, true, true, &[]);
        let mut matrix = Matrix::new(&mut random, Shape { rows: n, k }, scheme, &[4, 1, 1, 2], 4);
        let (mut x, bias) = (values(&mut random, m * k), values(&mut random, n));
        if m > 2 {
            x[k] = f32::NAN;
        }
        let low = matrix.int8(&x, m, Some(&bias));
        let packed = matrix.packed.clone();
        matrix.read_bits = 8;
        let high = matrix.int8(&x, m, Some(&bias));
        let sizes: Vec<f64> = x.chunks(k).map(|row| size(row, scheme.group_len(k))).collect();
        let mut sorted: Vec<f64> = sizes.iter().copied().filter(|size| size.is_finite()).collect();
        sorted.sort_by(f64::total_cmp);
        for threshold in [-1.0, sorted[sorted.len() / 2], f64::INFINITY] {
            let expected: Vec<bool> = sizes.iter().map(|size| *size > threshold).collect();
            for token in Token::available() {
                for threads in [1, 2, 7] {
                    let (mut out, mut refined) = (vec![f32::INFINITY; m * n], vec![true; m]);
                    let at = |read_bits| {
                        let (scales, zeros) = (matrix.rows().scales, matrix.zero_points());
                        let (rounding, planes, layout) =
                            (&matrix.rounding, &matrix.planes, Layout::Canonical);
                        checked(
                            &packed,
                            scales,
                            zeros,
                            matrix.shape,
                            &scheme,
                            rounding,
                            planes,
                            read_bits,
                            layout,
                        )
                        .unwrap()
                    };
                    let count = refined::matmul_refined_on(
                        token,
                        Source::F32(&x),
                        m,
                        &[at(4), at(8)],
                        Layout::Canonical,
                        Some(&bias),
                        threshold,
                        Target::F32(&mut out),
                        &mut refined,
                        threads,
                    );
                    assert_eq!(refined, expected, "{} m={m}", token.name());
                    assert_eq!(count, Ok(expected.iter().filter(|refined| **refined).count()));
                    for (row, out) in out.chunks(n).enumerate() {
                        let from = if refined[row] { &high } else { &low };
                        let same =
                            out.iter().zip(&from[row * n..]).all(|(a, b)| canonical(*a) == canonical(*b));
                        assert!(same, "{} threads={threads} m={m} row {row}", token.name());
                    }
                }
            }
        }
    }
}

/// √ Σ s_x² over the groups of a row, by plain loops.
fn size(row: &[f32], group: usize) -> f64 {
    let scales = row.chunks(group).map(|group| {
        let largest = group.iter().fold(0.0f32, |a, b| if b.is_nan() { f32::NAN } else { a.max(b.abs()) });
        let scale = largest / 127.0;
        f64::from(if scale < f32::MIN_POSITIVE { 0.0 } else { scale })
    });
    let sum = scales.map(|scale| scale * scale).fold(0.0, |a, b| a + b);
    if row.iter().all(|x| x.is_finite()) { sum.sqrt() } else { f64::NAN }
}
