//! Every instruction set of this CPU against the reference: same bits, for every scheme, rounding and length.

use half::{bf16, f16};
use proptest::prelude::*;

use crate::quantize::{pack_on, unpack_on};
use crate::reference::{self, Quantized};
use crate::simd::Token;
use crate::*;

/// Normal deviates from a counter (Box and Muller), with zeros of both signs and subnormals strewn in.
fn normal(n: usize, seed: u32) -> Vec<f32> {
    let value = |i: usize| {
        let [a, b, c, _] = philox([i as u32, 0, 0, 0], [seed, 7]);
        let uniform = (f64::from(a) + 0.5) / 4_294_967_296.0;
        let angle = f64::from(b) / 4_294_967_296.0 * std::f64::consts::TAU;
        match c % 50 {
            0 => -0.0,
            1 => 0.0,
            2 => -1e-39,
            3 => 1e-39,
            _ => ((-2.0 * uniform.ln()).sqrt() * angle.cos()) as f32,
        }
    };
    (0..n).map(value).collect()
}

/// What [`pack`] wrote, unpacked to comparable types.
struct Packed {
    blob: Vec<u8>,
    scales: Vec<f32>,
    zero_points: Vec<f32>,
}

fn pack_with(
    isa: Token,
    x: Source<'_>,
    shape: Shape,
    scheme: &Scheme,
    rounding: &Rounding,
    planes: &Planes,
    nan_zero: bool,
    threads: usize,
) -> Result<Packed, Error> {
    let groups = shape.rows * scheme.groups(shape.k);
    let mut blob = vec![0xa5; planes.nbytes(shape.rows, shape.k)];
    let (mut half_scales, mut float_scales) = (vec![0u16; groups], vec![0f32; groups]);
    let (mut bytes, mut floats) = (vec![0u8; groups], vec![0f32; groups]);
    let scales = match scheme.scale_dtype() {
        ScaleDtype::Bf16 => ScalesMut::Bf16(&mut half_scales),
        ScaleDtype::F16 => ScalesMut::F16(&mut half_scales),
        ScaleDtype::F32 => ScalesMut::F32(&mut float_scales),
    };
    let zero_points = match scheme.zero_point() {
        _ if rounding.preserve_variance() => ZeroPointsMut::F32(&mut floats),
        None => ZeroPointsMut::U8(&mut bytes),
        Some(_) => ZeroPointsMut::Constant,
    };
    pack_on(isa, x, shape, scheme, rounding, planes, nan_zero, &mut blob, scales, zero_points, threads)?;
    let widen = |s: &u16| match scheme.scale_dtype() {
        ScaleDtype::Bf16 => bf16::from_bits(*s).to_f32(),
        _ => f16::from_bits(*s).to_f32(),
    };
    let scales = match scheme.scale_dtype() {
        ScaleDtype::F32 => float_scales,
        _ => half_scales.iter().map(widen).collect(),
    };
    let zero_points = match scheme.zero_point() {
        _ if rounding.preserve_variance() => floats,
        None => bytes.iter().map(|z| f32::from(*z)).collect(),
        Some(z) => vec![z; groups],
    };
    Ok(Packed { blob, scales, zero_points })
}

fn unpack_with(
    isa: Token,
    p: &Packed,
    shape: Shape,
    scheme: &Scheme,
    rounding: &Rounding,
    planes: &Planes,
    read_bits: u32,
    out: Target<'_>,
    threads: usize,
) -> Result<(), Error> {
    let half_scales: Vec<u16> = match scheme.scale_dtype() {
        ScaleDtype::Bf16 => p.scales.iter().map(|s| bf16::from_f32(*s).to_bits()).collect(),
        _ => p.scales.iter().map(|s| f16::from_f32(*s).to_bits()).collect(),
    };
    let scales = match scheme.scale_dtype() {
        ScaleDtype::Bf16 => Scales::Bf16(&half_scales),
        ScaleDtype::F16 => Scales::F16(&half_scales),
        ScaleDtype::F32 => Scales::F32(&p.scales),
    };
    let bytes: Vec<u8> = p.zero_points.iter().map(|z| *z as u8).collect();
    let zero_points = match scheme.zero_point() {
        _ if rounding.preserve_variance() => ZeroPoints::F32(&p.zero_points),
        None => ZeroPoints::U8(&bytes),
        Some(_) => ZeroPoints::Constant,
    };
    unpack_on(isa, &p.blob, scales, zero_points, shape, scheme, rounding, planes, read_bits, out, threads)
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// Packs and unpacks on every ISA and compares each bit with the reference.
fn check(x: &[f32], shape: Shape, scheme: &Scheme, rounding: &Rounding, planes: &Planes, threads: usize) {
    let expected = reference::quantize(x, shape, scheme, rounding);
    let widths: Vec<u32> = planes.widths().to_vec();
    let blob = reference::pack_codes(&expected.codes, shape, &widths);
    for isa in Token::available() {
        let what = format!("{} {shape:?} {scheme:?} {rounding:?} {widths:?} threads {threads}", isa.name());
        let packed = pack_with(isa, Source::F32(x), shape, scheme, rounding, planes, false, threads).unwrap();
        assert_eq!(bits(&packed.scales), bits(&expected.scales), "scales: {what}");
        assert_eq!(bits(&packed.zero_points), bits(&expected.zero_points), "zero points: {what}");
        if packed.blob != blob {
            let at = packed.blob.iter().zip(&blob).position(|(a, b)| a != b);
            panic!("blob differs at byte {at:?}: {what}");
        }
        let mut reads = planes.prefixes();
        if *planes == Planes::BYTES || scheme.table().is_some() || rounding.mode() == Mode::Subtractive {
            reads = vec![scheme.bits()];
        }
        for read_bits in reads {
            let decoded = reference::dequantize(&expected, shape, scheme, rounding, read_bits);
            let mut out = vec![f32::NAN; x.len()];
            let target = Target::F32(&mut out);
            unpack_with(isa, &packed, shape, scheme, rounding, planes, read_bits, target, threads).unwrap();
            assert_eq!(bits(&out), bits(&decoded), "decoded at {read_bits} bits: {what}");
        }
    }
}

fn uniform(bits: u32, group_size: usize, symmetric: bool, scale: ScaleRule, dtype: ScaleDtype) -> Scheme {
    Scheme::new(bits, group_size, symmetric, false, &[], scale, dtype).unwrap()
}

fn nested(group_size: usize) -> Scheme {
    Scheme::new(8, group_size, true, true, &[], ScaleRule::Extreme, ScaleDtype::Bf16).unwrap()
}

fn rounding(mode: Mode, draw_bits: u32, variance: f32, preserve: bool, offset: u64) -> Rounding {
    Rounding::new(mode, 0x0123_4567_89ab_cdef, 3, 99, draw_bits, variance, preserve, offset).unwrap()
}

const NF4: [u8; 16] = [1, 40, 61, 78, 92, 105, 116, 128, 138, 148, 159, 171, 184, 199, 220, 255];
const DTYPES: [ScaleDtype; 3] = [ScaleDtype::Bf16, ScaleDtype::F16, ScaleDtype::F32];
const STOCHASTIC: [Mode; 5] =
    [Mode::Iid, Mode::Antithetic, Mode::Stratified, Mode::Systematic, Mode::Subtractive];

/// Lengths around every tile and group boundary.
const LENGTHS: [usize; 24] =
    [0, 1, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 72, 100, 127, 128, 129, 130, 192, 1023, 1025, 2048, 2500];

#[test]
fn nearest_equals_the_reference_for_every_length_up_to_130() {
    for k in 0..=130 {
        let x = normal(2 * k, k as u32);
        for bits in 1..=8 {
            let scheme = uniform(bits, 64, true, ScaleRule::Extreme, ScaleDtype::Bf16);
            check(&x, Shape { rows: 2, k }, &scheme, &Rounding::nearest(), &Planes::of_bits(bits), 1);
        }
    }
}

#[test]
fn nearest_equals_the_reference_for_every_scheme() {
    for k in LENGTHS {
        let shape = Shape { rows: 2, k };
        let x = normal(shape.len(), 11);
        for group_size in [8, 9, 64, 100, 128, 0] {
            for bits in 1..=8 {
                for dtype in DTYPES {
                    for (symmetric, scale) in [
                        (true, ScaleRule::Extreme),
                        (false, ScaleRule::Extreme),
                        (true, ScaleRule::Mse),
                        (false, ScaleRule::Mse),
                    ] {
                        if bits == 1 && !symmetric || scale == ScaleRule::Mse && k > 200 {
                            continue;
                        }
                        let scheme = uniform(bits, group_size, symmetric, scale, dtype);
                        check(&x, shape, &scheme, &Rounding::nearest(), &Planes::of_bits(bits), 1);
                    }
                }
            }
        }
    }
}

#[test]
fn nested_and_tables_equal_the_reference() {
    for k in LENGTHS {
        let shape = Shape { rows: 3, k };
        let x = normal(shape.len(), 5);
        for group_size in [8, 9, 64, 100, 0] {
            for widths in [&[4, 4][..], &[4, 1, 1, 2], &[2, 1, 1, 1, 1, 2], &[8]] {
                let scheme = nested(group_size);
                let planes = Planes::for_scheme(widths, &scheme).unwrap();
                check(&x, shape, &scheme, &Rounding::nearest(), &planes, 1);
            }
            let between_signs = &[1, 100, 156, 255]; // where a subnormal is told from a zero
            let tables =
                [(4, &NF4[..]), (4, &[1, 100, 200]), (3, &NF4[3..11]), (2, &NF4[..3]), (2, between_signs)];
            for (bits, table) in tables {
                for scale in [ScaleRule::Extreme, ScaleRule::Mse, ScaleRule::Rms] {
                    for dtype in DTYPES {
                        let scheme = Scheme::new(bits, group_size, true, false, table, scale, dtype).unwrap();
                        check(&x, shape, &scheme, &Rounding::nearest(), &Planes::of_bits(bits), 1);
                    }
                }
            }
        }
    }
}

#[test]
fn stochastic_equals_the_reference_for_every_mode() {
    for k in LENGTHS {
        let shape = Shape { rows: 2, k };
        let x = normal(shape.len(), 23);
        for group_size in [9, 64, 100, 0] {
            for bits in 1..=8 {
                for symmetric in [true, false] {
                    for mode in STOCHASTIC {
                        for draw_bits in [16, 32] {
                            if bits == 1 && !symmetric {
                                continue;
                            }
                            let dtype = DTYPES[(bits as usize + k) % 3];
                            let scheme = uniform(bits, group_size, symmetric, ScaleRule::Extreme, dtype);
                            let rounding = rounding(mode, draw_bits, 1.0, false, 3 * k as u64);
                            check(&x, shape, &scheme, &rounding, &Planes::of_bits(bits), 1);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn shrunk_and_variance_preserving_rounding_equal_the_reference() {
    for k in [1, 17, 64, 100, 130, 1100] {
        let shape = Shape { rows: 2, k };
        let x = normal(shape.len(), 31);
        for group_size in [9, 64, 0] {
            for bits in [2, 4, 8] {
                for mode in &STOCHASTIC[..4] {
                    for draw_bits in [16, 32] {
                        for (variance, preserve) in [(0.0, false), (0.3, false), (1.0, true), (0.7, true)] {
                            for symmetric in [true, false] {
                                let dtype = DTYPES[bits as usize % 3];
                                let scheme = uniform(bits, group_size, symmetric, ScaleRule::Extreme, dtype);
                                let rounding = rounding(*mode, draw_bits, variance, preserve, 0);
                                check(&x, shape, &scheme, &rounding, &Planes::of_bits(bits), 1);
                            }
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn magnitudes_at_the_ends_of_the_domain_equal_the_reference() {
    for exponent in
        [-149, -130, -127, -126, -124, -122, -118, -110, -100, -93, -66, -60, -59, -20, 14, 100, 119]
    {
        let x: Vec<f32> = normal(300, 3)
            .iter()
            .map(|x| (f64::from(x.clamp(-1.9, 1.9)) * 2f64.powi(exponent)) as f32)
            .collect();
        let shape = Shape { rows: 3, k: 100 };
        for bits in [1, 2, 4, 8] {
            for symmetric in [true, bits == 1] {
                for dtype in [ScaleDtype::Bf16, ScaleDtype::F32, ScaleDtype::F16] {
                    if dtype == ScaleDtype::F16 && exponent > 14 {
                        continue;
                    }
                    let scheme = uniform(bits, 64, symmetric, ScaleRule::Extreme, dtype);
                    check(&x, shape, &scheme, &Rounding::nearest(), &Planes::of_bits(bits), 1);
                    for mode in STOCHASTIC {
                        for draw_bits in [16, 32] {
                            let rounding = rounding(mode, draw_bits, 1.0, false, 0);
                            check(&x, shape, &scheme, &rounding, &Planes::of_bits(bits), 1);
                        }
                    }
                }
            }
        }
        check(&x, shape, &nested(64), &Rounding::nearest(), &Planes::of_bits(8), 1);
    }
}

#[test]
fn threads_and_slices_give_the_same_bits() {
    for (rows, k, group_size) in
        [(1, 200_000, 64), (1, 150_001, 100), (300, 1000, 64), (2000, 130, 64), (70_000, 8, 8)]
    {
        let shape = Shape { rows, k };
        let x = normal(shape.len(), 77);
        for mode in [Mode::Nearest, Mode::Iid, Mode::Stratified, Mode::Systematic] {
            let scheme = uniform(3, group_size, true, ScaleRule::Extreme, ScaleDtype::Bf16);
            let rounding = rounding(mode, 16, 1.0, false, 0);
            let planes = Planes::of_bits(3);
            let isa = Token::available()[0];
            let pack = |threads| {
                pack_with(isa, Source::F32(&x), shape, &scheme, &rounding, &planes, false, threads).unwrap()
            };
            let one = pack(1);
            for threads in [2, 7] {
                let many = pack(threads);
                assert!(one.blob == many.blob && one.scales == many.scales, "{shape:?} {mode:?} {threads}");
                let unpack = |threads| {
                    let mut out = vec![f32::NAN; x.len()];
                    let target = Target::F32(&mut out);
                    unpack_with(isa, &one, shape, &scheme, &rounding, &planes, 3, target, threads).unwrap();
                    bits(&out)
                };
                assert!(unpack(1) == unpack(threads), "{shape:?} {mode:?} {threads}");
            }
        }
    }
}

#[test]
fn every_source_and_target_type_equals_f32_after_conversion() {
    let shape = Shape { rows: 3, k: 333 };
    let x = normal(shape.len(), 9);
    let doubles: Vec<f64> = x.iter().map(|x| f64::from(*x) * (1.0 + 1e-9)).collect();
    let brains: Vec<bf16> = x.iter().map(|x| bf16::from_f32(*x)).collect();
    let halves: Vec<f16> = x.iter().map(|x| f16::from_f32(*x)).collect();
    let scheme = uniform(8, 64, false, ScaleRule::Extreme, ScaleDtype::Bf16);
    let rounding = Rounding::nearest();
    let planes = Planes::of_bits(8);
    for isa in Token::available() {
        for (source, as_f32) in [
            (Source::F64(&doubles), doubles.iter().map(|x| *x as f32).collect::<Vec<_>>()),
            (Source::Bf16(&brains), brains.iter().map(|x| x.to_f32()).collect()),
            (Source::F16(&halves), halves.iter().map(|x| x.to_f32()).collect()),
        ] {
            let packed = pack_with(isa, source, shape, &scheme, &rounding, &planes, false, 1).unwrap();
            let expected = reference::quantize(&as_f32, shape, &scheme, &rounding);
            assert_eq!(packed.blob, expected.codes, "{}", isa.name());
            assert_eq!(packed.scales, expected.scales);
            let decoded = reference::dequantize(&expected, shape, &scheme, &rounding, 8);
            let mut out64 = vec![0f64; x.len()];
            let mut out_bf16 = vec![bf16::ZERO; x.len()];
            let mut out_f16 = vec![f16::ZERO; x.len()];
            for target in [Target::F64(&mut out64), Target::Bf16(&mut out_bf16), Target::F16(&mut out_f16)] {
                unpack_with(isa, &packed, shape, &scheme, &rounding, &planes, 8, target, 1).unwrap();
            }
            assert!(decoded.iter().zip(&out64).all(|(x, y)| f64::from(*x) == *y));
            assert!(decoded.iter().zip(&out_bf16).all(|(x, y)| bf16::from_f32(*x) == *y));
            assert!(decoded.iter().zip(&out_f16).all(|(x, y)| f16::from_f32(*x) == *y));
        }
    }
}

#[test]
fn large_outputs_are_streamed_and_equal_small_ones() {
    let shape = Shape { rows: 3, k: 700_001 };
    let x = normal(shape.len(), 1);
    let scheme = uniform(4, 64, true, ScaleRule::Extreme, ScaleDtype::Bf16);
    check(&x, shape, &scheme, &Rounding::nearest(), &Planes::of_bits(4), 2);
}

#[test]
fn the_first_bad_element_is_named() {
    let scheme = uniform(4, 64, true, ScaleRule::Extreme, ScaleDtype::Bf16);
    let shape = Shape { rows: 1000, k: 333 };
    let pack = |x: &[f32], nan_zero, threads| {
        let isa = Token::available()[0];
        let planes = Planes::of_bits(4);
        pack_with(isa, Source::F32(x), shape, &scheme, &Rounding::nearest(), &planes, nan_zero, threads)
    };
    for threads in [1, 3] {
        for at in [0, 63, 64, 332, 333, 200_000, 332_999] {
            let mut x = normal(shape.len(), 2);
            for (bad, error) in [
                (f32::NAN, Error::Nan(at)),
                (-f32::NAN, Error::Nan(at)),
                (f32::INFINITY, Error::Infinite(at)),
                (f32::NEG_INFINITY, Error::Infinite(at)),
                (-2e36, Error::Domain { index: at, value: f64::from(-2e36f32) }),
            ] {
                x[at] = bad;
                x[shape.len() - 1] = bad;
                assert_eq!(pack(&x, false, threads).err(), Some(error.clone()), "{at} {bad}");
                assert_eq!(pack(&x, true, threads).is_ok(), bad.is_nan(), "{at} {bad}");
            }
            x[at] = 2f32.powi(120);
            x[shape.len() - 1] = -2f32.powi(120);
            assert!(pack(&x, false, threads).is_ok());
            let zeros: Vec<f32> = x.iter().enumerate().map(|(i, x)| if i == at { 0.0 } else { *x }).collect();
            x[at] = f32::NAN;
            assert_eq!(pack(&x, true, threads).unwrap().blob, pack(&zeros, false, threads).unwrap().blob);
        }
    }
}

#[test]
fn a_scale_too_large_for_half_precision_is_an_error_naming_bf16() {
    let mut x = vec![1.0; 256];
    x[200] = 1e6;
    let shape = Shape { rows: 2, k: 128 };
    let scheme = uniform(2, 64, true, ScaleRule::Extreme, ScaleDtype::F16);
    let planes = Planes::of_bits(2);
    for rounding in [Rounding::nearest(), rounding(Mode::Iid, 16, 1.0, false, 0)] {
        for isa in Token::available() {
            let error = pack_with(isa, Source::F32(&x), shape, &scheme, &rounding, &planes, false, 1).err();
            assert_eq!(error, Some(Error::ScaleOverflow { group: 3, dtype: ScaleDtype::F16 }));
            assert!(error.unwrap().to_string().contains("bf16"));
        }
    }
}

#[test]
fn planes_invert_for_every_length_0_to_130_and_any_threads() {
    for widths in [
        &[8][..],
        &[4, 2, 1],
        &[4, 2],
        &[4, 1],
        &[4],
        &[2, 1],
        &[2],
        &[1],
        &[4, 4],
        &[4, 1, 1, 2],
        &[2, 1, 1, 1, 1, 2],
    ] {
        let planes = Planes::new(widths).unwrap();
        for k in (0..=130).chain([70_000]) {
            let shape = Shape { rows: 3, k };
            let codes: Vec<u8> = (0..shape.len())
                .map(|i| (philox([i as u32, 1, 2, 3], [4, 5])[0] & ((1 << planes.bits()) - 1)) as u8)
                .collect();
            let expected = reference::pack_codes(&codes, shape, widths);
            for threads in [1, 7] {
                let mut blob = vec![0xa5; planes.nbytes(shape.rows, shape.k)];
                pack_codes(&codes, shape, &planes, &mut blob, threads).unwrap();
                assert_eq!(blob, expected, "{widths:?} {k}");
                for read_bits in planes.prefixes() {
                    let mut prefix = vec![0xa5; shape.len()];
                    let len = planes.prefix(read_bits).unwrap().nbytes(shape.rows, shape.k);
                    unpack_codes(&blob[..len], shape, &planes, read_bits, &mut prefix, threads).unwrap();
                    let top = codes.iter().map(|code| u32::from(*code) >> (planes.bits() - read_bits));
                    assert!(top.eq(prefix.iter().map(|code| u32::from(*code))), "{widths:?} {k} {read_bits}");
                }
            }
        }
    }
}

#[test]
fn the_search_list_is_the_one_of_the_golden_vectors() {
    let text = include_str!("../../tests/vectors/mse_multiples.json");
    let (_, list) = text.split_once("\"multiples\": [").unwrap();
    let (list, _) = list.split_once(']').unwrap();
    let list: Vec<f32> = list.split(',').map(|number| number.trim().parse().unwrap()).collect();
    assert_eq!(list, MSE_MULTIPLES);
    assert_eq!(list[0], 1.0);
}

#[test]
fn wrong_buffers_schemes_and_roundings_are_refused_with_the_numbers() {
    let new = |bits, group_size, symmetric, nested, table: &[u8], scale| {
        Scheme::new(bits, group_size, symmetric, nested, table, scale, ScaleDtype::Bf16).err()
    };
    assert_eq!(new(0, 64, true, false, &[], ScaleRule::Extreme), Some(Error::Bits(0)));
    assert_eq!(new(9, 64, true, false, &[], ScaleRule::Extreme), Some(Error::Bits(9)));
    assert_eq!(new(4, 7, true, false, &[], ScaleRule::Extreme), Some(Error::GroupSize(7)));
    for refused in [
        new(1, 64, false, false, &[], ScaleRule::Extreme),
        new(4, 64, true, true, &[], ScaleRule::Extreme),
        new(8, 64, true, true, &[], ScaleRule::Mse),
        new(8, 64, true, false, &NF4, ScaleRule::Extreme),
        new(2, 64, true, false, &NF4, ScaleRule::Extreme),
        new(4, 64, true, false, &[5, 5], ScaleRule::Extreme),
        new(4, 64, true, false, &[], ScaleRule::Rms),
    ] {
        assert!(matches!(refused, Some(Error::Scheme(_))), "{refused:?}");
    }
    let scheme = uniform(4, 64, true, ScaleRule::Extreme, ScaleDtype::Bf16);
    assert!(Planes::for_scheme(&[2, 2], &scheme).unwrap_err().to_string().contains("[4] or [8]"));
    assert!(Planes::new(&[4, 4]).unwrap().prefix(5).unwrap_err().to_string().contains("[4, 8]"));
    assert!(Planes::new(&[u32::MAX, 9]).is_err() && Planes::new(&[]).is_err());
    let shape = Shape { rows: 2, k: 64 };
    let isa = Token::available()[0];
    let block = rounding(Mode::Systematic, 16, 1.0, false, 65);
    let x = normal(shape.len(), 1);
    let refused = |scheme: &Scheme, rounding: &Rounding| {
        pack_with(isa, Source::F32(&x), shape, scheme, rounding, &Planes::of_bits(scheme.bits()), false, 1)
            .err()
    };
    assert!(matches!(refused(&scheme, &block), Some(Error::Offset { offset: 65, k: 64, .. })));
    let iid = rounding(Mode::Iid, 16, 1.0, false, 0);
    assert!(matches!(refused(&nested(64), &iid), Some(Error::Rounding(_))));
    let short = pack_codes(&[1, 2], shape, &Planes::of_bits(4), &mut [], 1);
    assert!(short.unwrap_err().to_string().contains("codes has 2 elements"));
}

#[test]
fn isas_can_be_listed_and_forced() {
    assert_eq!(*available_isas().last().unwrap(), "scalar");
    assert!(available_isas().iter().all(|name| compiled_isas().contains(name)));
    assert!(force_isa(Some("mmx")).unwrap_err().to_string().contains("scalar"));
    for name in available_isas() {
        force_isa(Some(name)).unwrap();
        assert_eq!(active_isa(), name);
    }
    force_isa(None).unwrap();
    assert_eq!(active_isa(), available_isas()[0]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_tensor_under_any_scheme_equals_the_reference(
        rows in 1usize..4,
        k in 1usize..400,
        group_size in prop_oneof![Just(0usize), 8usize..140],
        bits in 1u32..=8,
        symmetric: bool,
        mode in 0usize..6,
        wide: bool,
        offset_rows in 0u64..1000,
        magnitude in -60i32..60,
        seed: u32,
    ) {
        let mode = if mode == 5 { Mode::Nearest } else { STOCHASTIC[mode] };
        let shape = Shape { rows, k };
        let x: Vec<f32> = normal(shape.len(), seed).iter().map(|x| x * 2f32.powi(magnitude)).collect();
        let scheme = uniform(bits, group_size, symmetric || bits == 1, ScaleRule::Extreme, ScaleDtype::Bf16);
        let rounding = rounding(mode, if wide { 32 } else { 16 }, 1.0, false, offset_rows * k as u64);
        check(&x, shape, &scheme, &rounding, &Planes::of_bits(bits), 1);
        check(&x, shape, &scheme, &rounding, &Planes::BYTES, 1);
    }
}

/// The oracle itself, against numbers worked by hand.
#[test]
fn the_reference_decodes_a_known_group() {
    let scheme = uniform(2, 8, true, ScaleRule::Extreme, ScaleDtype::F32);
    let shape = Shape { rows: 1, k: 8 };
    let x = [4.0, -4.0, 1.0, -1.0, 0.0, 3.1, -2.9, 2.0];
    let q = reference::quantize(&x, shape, &scheme, &Rounding::nearest());
    assert_eq!(
        q,
        Quantized { codes: vec![0, 3, 2, 2, 2, 0, 3, 1], scales: vec![-2.0], zero_points: vec![2.0] }
    );
    let decoded = reference::dequantize(&q, shape, &scheme, &Rounding::nearest(), 2);
    assert_eq!(decoded, [4.0, -2.0, 0.0, 0.0, 0.0, 4.0, -2.0, 2.0]);
}
