//! The scales and zero points of one panel of the weight, as the kernels for codes take them.

use crate::quantize::{Rows, ZeroPoints};
use crate::simd::{Isa, LANES};

use super::Layout;
use super::affine::Affine;
use super::panel::{Lanes, Panel, PanelScales, transpose_rows};

/// Memory for them, to be used panel after panel.
#[derive(Default)]
pub(super) struct Factors {
    /// Scales, unless they lie so in memory: `[group][vector]`, as bits of f32.
    scales: Vec<Lanes>,
    /// Zero points likewise, as [`Affine::zero`] has them; a single vector if the scheme fixes them.
    zeros: Vec<Lanes>,
    /// Rows of scales on their way to lanes.
    by_row: Vec<f32>,
    /// Groups of scales on their way to the panel's.
    by_group: Vec<Lanes>,
}

impl Factors {
    /// The scales and zero points of the panel that was loaded.
    #[inline(always)]
    pub(super) fn of<'a>(
        &'a self,
        weight: &Rows<'a>,
        layout: Layout,
        panel: Panel,
    ) -> (PanelScales<'a>, &'a [Lanes]) {
        let from = panel.first * weight.scheme.groups(weight.shape.k);
        let scales = match layout {
            Layout::Canonical => PanelScales::Lanes(&self.scales),
            Layout::Panels => PanelScales::stored(weight.scales, from),
        };
        (scales, &self.zeros)
    }

    /// Loads those of a panel.
    #[inline(always)]
    pub(super) fn load<I: Isa>(
        &mut self,
        isa: I,
        weight: &Rows<'_>,
        layout: Layout,
        affine: &Affine,
        panel: Panel,
    ) {
        let groups = weight.scheme.groups(weight.shape.k);
        let vectors = panel.vectors();
        let from = panel.first * groups;
        if layout == Layout::Canonical {
            self.scales.resize(groups * vectors, [0; LANES]);
            self.by_group.resize(groups.next_multiple_of(LANES), [0; LANES]);
            for c in 0..vectors {
                self.by_row.resize(panel.rows_of(c) * groups, 0.0);
                weight.scales.widen(from + c * LANES * groups, &mut self.by_row);
                transpose_rows(isa, &self.by_row, groups, &mut self.by_group);
                for (to, lanes) in self.scales.chunks_exact_mut(vectors).zip(&self.by_group) {
                    to[c] = *lanes;
                }
            }
        }
        match weight.zero_points {
            ZeroPoints::U8(zeros) if affine.stored => {
                self.zeros.resize(groups * vectors, [0; LANES]);
                if layout == Layout::Panels {
                    for (to, from) in self.zeros.iter_mut().zip(zeros[from..].chunks_exact(LANES)) {
                        for (to, z) in to.iter_mut().zip(from) {
                            *to = affine.zero(Some(*z));
                        }
                    }
                    return;
                }
                for row in 0..panel.rows {
                    let (c, lane) = (row / LANES, row % LANES);
                    let zeros = &zeros[from + row * groups..][..groups];
                    for (to, z) in self.zeros.chunks_exact_mut(vectors).zip(zeros) {
                        to[c][lane] = affine.zero(Some(*z));
                    }
                }
            }
            _ => {
                self.zeros.clear();
                self.zeros.push([affine.zero(None); LANES]);
            }
        }
    }
}
