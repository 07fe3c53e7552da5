//! The contract once more, element by element and as plainly as it reads: what the vector code is tested against.

use half::{bf16, f16};

use crate::philox::philox;
use crate::scheme::{Mode, Rounding, ScaleDtype, ScaleRule, Scheme};
use crate::{MSE_MULTIPLES, Shape};

/// Codes, scales and zero points of a tensor.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Quantized {
    pub(crate) codes: Vec<u8>,
    pub(crate) scales: Vec<f32>,
    pub(crate) zero_points: Vec<f32>,
}

/// A sum in the contract's order: lane i mod 16, then lanes j and j + 8, 4, 2, 1.
pub(crate) fn sum(terms: impl Iterator<Item = f32>) -> f32 {
    let mut lanes = [0.0f32; 16];
    for (i, term) in terms.enumerate() {
        lanes[i % 16] += term;
    }
    for half in [8, 4, 2, 1] {
        for j in 0..half {
            lanes[j] += lanes[j + half];
        }
    }
    lanes[0]
}

fn to_dtype(dtype: ScaleDtype, s: f32) -> f32 {
    match dtype {
        ScaleDtype::Bf16 => bf16::from_f32(s).to_f32(),
        ScaleDtype::F16 => f16::from_f32(s).to_f32(),
        ScaleDtype::F32 => s,
    }
}

fn round_scale(dtype: ScaleDtype, s: f32) -> f32 {
    let s = to_dtype(dtype, s);
    if s.abs() < f32::MIN_POSITIVE { 0.0 } else { s }
}

/// Smallest scale that is enough, found by walking up from far below.
fn smallest(dtype: ScaleDtype, near: f64, enough: impl Fn(f64) -> bool) -> f32 {
    let above = |s: f32| match dtype {
        ScaleDtype::Bf16 => f32::from_bits((s.to_bits() >> 16 << 16) + (1 << 16)),
        ScaleDtype::F16 => f16::from_bits(f16::from_f32(s).to_bits() + 1).to_f32(),
        ScaleDtype::F32 => f32::from_bits(s.to_bits() + 1),
    };
    let mut s = to_dtype(dtype, (near * (1.0 - 1e-6)) as f32);
    if enough(s.into()) {
        s = to_dtype(dtype, (near * 0.99) as f32);
    }
    while !enough(s.into()) {
        s = above(s);
    }
    if s < f32::MIN_POSITIVE { 0.0 } else { s }
}

struct Draws<'a> {
    rounding: &'a Rounding,
}

impl Draws<'_> {
    fn word(&self, purpose: u32, n: u64, word: usize) -> u32 {
        let r = self.rounding;
        let counter = [n as u32, (n >> 32) as u32 | purpose << 24, r.stream(), r.step()];
        philox(counter, [r.seed() as u32, (r.seed() >> 32) as u32])[word]
    }

    fn block(&self, block: u64) -> u32 {
        self.word(1, block / 4, (block % 4) as usize)
    }

    fn iid(&self, i: u64) -> u32 {
        let in_tile = |j: u64, tile: u64| self.word(0, 16 * tile + j % 16, (j / 16) as usize);
        if self.rounding.draw_bits() == 32 {
            return in_tile(i % 64, i / 64);
        }
        let word = in_tile(i % 64, i / 128);
        if i % 128 < 64 { word & 0xffff } else { word >> 16 }
    }

    fn shrink(&self, draw: u32, bits: u32) -> u32 {
        let half = 1i64 << (bits - 1);
        (half + ((i64::from(self.rounding.shrink()) * (i64::from(draw) - half)) >> 16)) as u32
    }

    /// The draw of element `i`, which is number `at` of group number `group`.
    fn draw(&self, i: u64, group: u64, at: usize, group_len: usize) -> u32 {
        let bits = self.rounding.draw_bits();
        let ones = u32::MAX >> (32 - bits);
        let draw = match self.rounding.mode() {
            Mode::Antithetic if i % 2 == 1 => ones - self.iid(i - 1),
            Mode::Stratified => {
                let mut fraction = self.block(group * group_len.div_ceil(8) as u64 + at as u64 / 8);
                let mut order = [0u32, 1, 2, 3, 4, 5, 6, 7];
                for i in (1..8u32).rev() {
                    let product = u64::from(fraction) * u64::from(i + 1);
                    order.swap(i as usize, (product >> 32) as usize);
                    fraction = product as u32;
                }
                order[at % 8] << (bits - 3) | self.iid(i) >> 3
            }
            _ => self.iid(i),
        };
        self.shrink(draw, bits)
    }
}

/// Quantizes rows of f32 by the letter of the contract.
pub(crate) fn quantize(x: &[f32], shape: Shape, scheme: &Scheme, rounding: &Rounding) -> Quantized {
    let mut out = Quantized { codes: Vec::new(), scales: Vec::new(), zero_points: Vec::new() };
    if shape.is_empty() {
        return out;
    }
    let group_len = scheme.group_len(shape.k);
    let before = rounding.offset() / shape.k as u64 * scheme.groups(shape.k) as u64;
    let mut index = rounding.offset();
    for row in x.chunks(shape.k) {
        for group in row.chunks(group_len) {
            let x: Vec<f32> =
                group.iter().map(|x| if x.is_normal() { *x } else { x.signum() * 0.0 }).collect();
            let number = before + out.scales.len() as u64;
            let (s, z) = choose(&x, scheme, rounding);
            let codes = encode(&x, s, z, scheme, rounding, index, number, group_len);
            let (stored_s, stored_z) =
                if rounding.preserve_variance() { preserve(&x, s, z, scheme) } else { (s, z) };
            out.codes.extend(codes);
            out.scales.push(stored_s);
            out.zero_points.push(stored_z);
            index += x.len() as u64;
        }
    }
    out
}

fn choose(x: &[f32], scheme: &Scheme, rounding: &Rounding) -> (f32, f32) {
    let dtype = scheme.scale_dtype();
    let max = x.iter().fold(0.0f32, |m, x| m.max(*x));
    let min = x.iter().fold(0.0f32, |m, x| m.min(*x));
    let (far, near) = if max >= -min { (max, min) } else { (min, max) };
    let n = x.len() as f32;
    let levels = 1 << scheme.bits();
    let middle = (levels / 2) as f32;
    if let Some(table) = scheme.table() {
        let lloyd = [0.0, 0.7978845608, 1.51042, 2.15195, 2.73259][scheme.bits() as usize] / 127.0f64;
        let s = if scheme.scale() == ScaleRule::Rms {
            round_scale(dtype, (sum(x.iter().map(|x| x * x)) / n).sqrt() * lloyd as f32)
        } else {
            round_scale(dtype, far.abs() / 127.0)
        };
        let levels: Vec<f32> = table.levels().iter().map(|t| f32::from(*t) - 128.0).collect();
        return (search(x, s, scheme, |x, inv| levels[level(x * inv, &levels)]), 128.0);
    }
    if scheme.nested() {
        let enough = |s: f64| s * 128.0 >= far.abs().into() && s * 119.0 >= near.abs().into();
        let guess = (f64::from(far.abs()) / 128.0).max(f64::from(near.abs()) / 119.0);
        let s = smallest(dtype, guess, enough);
        return (if s != 0.0 && far >= 0.0 { -s } else { s }, 136.0);
    }
    if rounding.is_stochastic() {
        if scheme.symmetric() {
            let steps = if scheme.bits() == 1 { 0.5 } else { f64::from(middle) - 1.0 };
            let target = f64::from(far.abs());
            let s = smallest(dtype, target / steps, |s| s * steps >= target);
            return (s, if scheme.bits() == 1 { 0.5 } else { middle });
        }
        let (steps, target) = (f64::from(levels) - 2.0, f64::from(max) - f64::from(min));
        let s = smallest(dtype, target / steps, |s| s * steps >= target);
        return (s, if s == 0.0 { 0.0 } else { (-f64::from(min) / f64::from(s)).ceil() as f32 + 0.0 });
    }
    if scheme.bits() == 1 {
        return (round_scale(dtype, 2.0 * sum(x.iter().map(|x| x.abs())) / n), 0.5);
    }
    let last = levels as f32 - 1.0;
    let (s, z) = if scheme.symmetric() {
        (round_scale(dtype, -far / middle), middle)
    } else {
        let s = round_scale(dtype, (max - min) / last);
        (s, if s == 0.0 { 0.0 } else { (-min / s).round_ties_even().clamp(0.0, last) + 0.0 })
    };
    (search(x, s, scheme, |x, inv| ((x * inv).round_ties_even() + z).clamp(0.0, last) - z), z)
}

fn level(t: f32, levels: &[f32]) -> usize {
    levels.windows(2).filter(|pair| t > (pair[0] + pair[1]) / 2.0).count()
}

fn search(x: &[f32], s: f32, scheme: &Scheme, decoded: impl Fn(f32, f32) -> f32) -> f32 {
    if scheme.scale() != ScaleRule::Mse || s == 0.0 {
        return s;
    }
    let mut best = (f32::INFINITY, s);
    for multiple in MSE_MULTIPLES {
        let s = round_scale(scheme.scale_dtype(), multiple * s);
        let inv = if s == 0.0 { 0.0 } else { 1.0 / s };
        let error = sum(x.iter().map(|x| {
            let d = x - s * decoded(*x, inv);
            d * d
        }));
        if error < best.0 {
            best = (error, s);
        }
    }
    best.1
}

fn encode(
    x: &[f32],
    s: f32,
    z: f32,
    scheme: &Scheme,
    rounding: &Rounding,
    index: u64,
    group: u64,
    group_len: usize,
) -> Vec<u8> {
    let last = f64::from((1u32 << scheme.bits()) - 1);
    let one_bit = scheme.bits() == 1;
    if one_bit && s == 0.0 {
        return x.iter().map(|x| u8::from(*x >= 0.0)).collect();
    }
    if !rounding.is_stochastic() {
        let inv = if s == 0.0 { 0.0 } else { 1.0 / s };
        return x
            .iter()
            .map(|x| match scheme.table() {
                Some(table) => {
                    let levels: Vec<f32> = table.levels().iter().map(|t| f32::from(*t) - 128.0).collect();
                    level(x * inv, &levels) as u8
                }
                None if one_bit => u8::from(*x >= 0.0),
                None => (f64::from((x * inv).round_ties_even()) + f64::from(z)).clamp(0.0, last) as u8,
            })
            .collect();
    }
    let draws = Draws { rounding };
    let mut phase = 0u32;
    let mut codes = Vec::new();
    for (at, x) in x.iter().enumerate() {
        let t = if s == 0.0 { 0.0 } else { x / s };
        let (whole, f) = if one_bit { (0.0, t + 0.5) } else { (t.floor(), t - t.floor()) };
        let up = if rounding.mode() == Mode::Systematic {
            if at % 64 == 0 {
                let block = group * group_len.div_ceil(64) as u64 + at as u64 / 64;
                phase = draws.shrink(draws.block(block) >> 8, 24);
            }
            let before = phase;
            phase = phase.wrapping_add((f64::from(f) * 16_777_216.0).round_ties_even() as u32);
            f64::from((phase >> 24).wrapping_sub(before >> 24) & 255)
        } else {
            let steps = 2f64.powi(rounding.draw_bits() as i32);
            let draw = draws.draw(index + at as u64, group, at, group_len);
            f64::from(u8::from(f64::from(draw) + (f64::from(f) * steps).round_ties_even() >= steps))
        };
        let z = if one_bit { 0.0 } else { f64::from(z) };
        codes.push((f64::from(whole) + up + z).clamp(0.0, last) as u8);
    }
    codes
}

fn preserve(x: &[f32], s: f32, z: f32, scheme: &Scheme) -> (f32, f32) {
    let n = x.len() as f32;
    let mean = sum(x.iter().copied()) / n;
    let variance = sum(x.iter().map(|x| (x - mean) * (x - mean))) / n;
    let noise = sum(x.iter().map(|x| {
        let t = if s == 0.0 { 0.0 } else { x / s };
        let f = t - t.floor();
        f * (1.0 - f)
    }));
    let noise = noise / n * s * s;
    let c = if variance + noise == 0.0 { 1.0 } else { (variance / (variance + noise)).sqrt() };
    let scale = round_scale(scheme.scale_dtype(), s * c);
    (scale, if scale == 0.0 { z } else { z - mean * (1.0 - c) / scale })
}

/// Decodes the top `read_bits` bits.
pub(crate) fn dequantize(
    q: &Quantized,
    shape: Shape,
    scheme: &Scheme,
    rounding: &Rounding,
    read_bits: u32,
) -> Vec<f32> {
    let group_len = scheme.group_len(shape.k);
    let dropped = scheme.bits() - read_bits;
    let draws = Draws { rounding };
    let value = |i: usize| {
        let group = i / shape.k * scheme.groups(shape.k) + i % shape.k / group_len;
        let mut k = u32::from(q.codes[i]) >> dropped << dropped;
        if let Some(table) = scheme.table() {
            k = table.levels()[k as usize].into();
        }
        let mut v = k as f32 + ((1u32 << dropped) as f32 - 1.0) / 2.0 - q.zero_points[group];
        if rounding.mode() == Mode::Subtractive {
            let draw = draws.iid(rounding.offset() + i as u64);
            let word = if rounding.draw_bits() == 32 { draw | 1 } else { draw << 16 | 0x8000 };
            v += 0x8000_0000u32.wrapping_sub(word) as i32 as f32 * 2f32.powi(-32);
        }
        q.scales[group] * v
    };
    (0..shape.len()).map(value).collect()
}

/// Planes by the letter: element `i` of a row at bit `i · width`, rows padded to a byte.
pub(crate) fn pack_codes(codes: &[u8], shape: Shape, widths: &[u32]) -> Vec<u8> {
    let mut blob = Vec::new();
    let mut shift: u32 = widths.iter().sum();
    for width in widths {
        shift -= width;
        for row in codes.chunks(shape.k.max(1)) {
            let mut bytes = vec![0u8; (shape.k * *width as usize).div_ceil(8)];
            for (i, code) in row.iter().enumerate() {
                let field = (u32::from(*code) >> shift & ((1 << width) - 1)) as u8;
                let bit = i * *width as usize;
                bytes[bit / 8] |= field << (bit % 8);
            }
            blob.extend(bytes);
        }
    }
    blob
}
