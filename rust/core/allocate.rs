//! Which item gets which choice under a budget: the multiple-choice knapsack of mixed precision.
//!
//! ```text
//!  for each item: choices (cost, score) ──► lower convex hull ──► edges (what a step up costs and gains)
//!  all edges, steepest first ──► taken while they fit; the first that does not is the break
//!  what is left of the budget ──► filled greedily ──► exact search among the items near the break
//! ```
//!
//! Minimising Σ score + λ · Σ cost leaves each item on its hull, and λ falling from infinity takes the edges
//! of all items in order of their slope (Everett, "Generalized Lagrange multiplier method", 1963; Sinha and
//! Zoltners, "The multiple-choice knapsack problem", 1979). Hence two things for free: the order of the edges
//! is a ladder of nested solutions, and the slope of the break bounds every other one: a choice that is dearer
//! than its item's own by more than the bound leaves open is in no better solution. What is left is a small
//! core, searched as in Pisinger, "A minimal algorithm for the multiple-choice knapsack problem" (1995).

use crate::error::Error;

/// What each choice of each item costs and scores: items × choices, row by row. Less is better in both.
#[derive(Debug, Clone, Copy)]
pub struct Choices<'a> {
    /// Cost of each choice, in whole units (bytes, nanoseconds).
    pub costs: &'a [u64],
    /// Score of each choice: what is to be small in the sum.
    pub scores: &'a [f64],
    /// Choices of an item.
    pub choices: usize,
}

/// Items nearest to the break whose choices are tried in all combinations.
const CORE: usize = 64;
/// Combinations kept after each of them.
const STATES: usize = 512;
/// A solution nearer to the bound than this share of its score is good enough.
const TOLERANCE: f64 = 1e-3;

/// One step along the hull of one item.
#[derive(Debug, Clone, Copy)]
struct Edge {
    item: usize,
    /// The choice that the step leads to.
    to: usize,
    cost: u64,
    /// Score gained for a unit of cost.
    slope: f64,
}

/// A choice for each item, and their cost.
struct Solution<'a> {
    table: Choices<'a>,
    chosen: Vec<usize>,
    cost: u64,
}

/// A combination of choices in the core, as what it changes in the break solution.
#[derive(Debug, Clone, Copy)]
struct State {
    cost: i128,
    /// Score changed + slope of the break × cost changed: never negative.
    excess: f64,
    /// The last of its moves.
    step: usize,
}

/// A move of one item to a choice, and the move before it.
#[derive(Debug, Clone, Copy)]
struct Step {
    before: usize,
    item: usize,
    choice: usize,
}

impl Choices<'_> {
    /// Refuses a table of the wrong size, and scores that have no order.
    fn check(&self) -> Result<(), Error> {
        let (got, need) = (self.scores.len(), self.costs.len());
        if got != need || self.choices == 0 || need % self.choices != 0 {
            return Err(Error::Table { costs: need, scores: got, choices: self.choices });
        }
        match self.scores.iter().position(|score| !score.is_finite()) {
            Some(index) => Err(Error::Score { item: index / self.choices, choice: index % self.choices }),
            None => Ok(()),
        }
    }

    fn items(&self) -> usize {
        self.costs.len() / self.choices
    }

    fn cost(&self, item: usize, choice: usize) -> u64 {
        self.costs[item * self.choices + choice]
    }

    fn score(&self, item: usize, choice: usize) -> f64 {
        self.scores[item * self.choices + choice]
    }

    /// The lower convex hull of an item, cheapest choice first: costs rise, scores fall, slopes flatten.
    fn hull(&self, item: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.choices).collect();
        let by_score = |&a: &usize, &b: &usize| self.score(item, a).total_cmp(&self.score(item, b));
        order.sort_by(|a, b| self.cost(item, *a).cmp(&self.cost(item, *b)).then(by_score(a, b)));
        let mut hull: Vec<usize> = Vec::with_capacity(self.choices);
        for choice in order {
            if hull.last().is_some_and(|&last| self.score(item, choice) >= self.score(item, last)) {
                continue; // dearer and no better
            }
            while let [.., a, b] = hull[..] {
                if self.edge(item, a, b).slope > self.edge(item, b, choice).slope {
                    break;
                }
                hull.pop();
            }
            hull.push(choice);
        }
        hull
    }

    fn edge(&self, item: usize, from: usize, to: usize) -> Edge {
        let cost = self.cost(item, to) - self.cost(item, from);
        let slope = (self.score(item, from) - self.score(item, to)) / cost as f64;
        Edge { item, to, cost, slope }
    }

    /// The cheapest choice of each item, and all edges that lead up from there, steepest first.
    fn path(&self) -> (Vec<usize>, Vec<Edge>) {
        let hulls: Vec<Vec<usize>> = (0..self.items()).map(|item| self.hull(item)).collect();
        let mut edges: Vec<Edge> = hulls
            .iter()
            .enumerate()
            .flat_map(|(item, hull)| hull.windows(2).map(move |pair| self.edge(item, pair[0], pair[1])))
            .collect();
        edges.sort_by(|a, b| b.slope.total_cmp(&a.slope)); // stable: an item's edges keep their order
        (hulls.iter().map(|hull| hull[0]).collect(), edges)
    }
}

impl Solution<'_> {
    fn new(table: Choices<'_>, chosen: Vec<usize>) -> Solution<'_> {
        let cost = chosen.iter().enumerate().map(|(item, &choice)| table.cost(item, choice)).sum();
        Solution { table, chosen, cost }
    }

    fn choose(&mut self, item: usize, choice: usize) {
        self.cost = self.cost - self.table.cost(item, self.chosen[item]) + self.table.cost(item, choice);
        self.chosen[item] = choice;
    }

    /// What another choice of an item changes: cost, score.
    fn change(&self, item: usize, choice: usize) -> (i128, f64) {
        let (table, own) = (self.table, self.chosen[item]);
        (
            i128::from(table.cost(item, choice)) - i128::from(table.cost(item, own)),
            table.score(item, choice) - table.score(item, own),
        )
    }

    /// Gives what is left of the budget away, item by item: to each the best choice that fits.
    fn fill(&mut self, items: impl Iterator<Item = usize>, budget: u64) {
        for item in items {
            let slack = i128::from(budget) - i128::from(self.cost);
            let fitting = (0..self.table.choices).filter(|&choice| self.change(item, choice).0 <= slack);
            let best = fitting.min_by(|&a, &b| self.change(item, a).1.total_cmp(&self.change(item, b).1));
            if let Some(choice) = best.filter(|&choice| self.change(item, choice).1 < 0.0) {
                self.choose(item, choice);
            }
        }
    }

    /// Takes the best combination of moves that fits and changes the score by less than `incumbent`, where the
    /// items' own choices are optimal for `slope`; whether there is one.
    ///
    /// A combination with cost and score changed by c and s has the excess s + slope · c; excesses only grow,
    /// so one beyond `incumbent + slope · slack` leads nowhere.
    fn search(&mut self, budget: u64, slope: f64, mut incumbent: f64) -> bool {
        let slack = i128::from(budget) - i128::from(self.cost);
        let excess = |(cost, score): (i128, f64)| (score + slope * cost as f64).max(0.0);
        let score = |state: &State| state.excess - slope * state.cost as f64;
        let room = |incumbent: f64| incumbent + slope * slack as f64;
        let mut core: Vec<(f64, usize)> = (0..self.chosen.len())
            .map(|item| {
                let others = (0..self.table.choices).filter(|&choice| choice != self.chosen[item]);
                let least =
                    others.map(|choice| excess(self.change(item, choice))).fold(f64::INFINITY, f64::min);
                (least, item)
            })
            .filter(|(least, _)| *least < room(incumbent))
            .collect();
        core.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        core.truncate(CORE);

        let start = State { cost: 0, excess: 0.0, step: 0 };
        let mut steps = vec![Step { before: 0, item: 0, choice: 0 }]; // number 0: no move
        let (mut states, mut best) = (vec![start], None);
        for &(_, item) in &core {
            let mut grown = states.clone();
            for choice in (0..self.table.choices).filter(|&choice| choice != self.chosen[item]) {
                let change = self.change(item, choice);
                for state in &states {
                    let next = State {
                        cost: state.cost + change.0,
                        excess: state.excess + excess(change),
                        step: steps.len(),
                    };
                    if next.excess >= room(incumbent) {
                        continue;
                    }
                    steps.push(Step { before: state.step, item, choice });
                    grown.push(next);
                    if next.cost <= slack && score(&next) < incumbent {
                        (incumbent, best) = (score(&next), Some(next));
                    }
                }
            }
            states = undominated(grown, score);
            states.retain(|state| state.excess < room(incumbent));
        }
        let mut step = best.map_or(0, |state| state.step);
        while step > 0 {
            let Step { before, item, choice } = steps[step];
            self.choose(item, choice);
            step = before;
        }
        best.is_some()
    }
}

/// The states than which no other is cheaper and scores less; of too many, those of least excess.
fn undominated(mut states: Vec<State>, score: impl Fn(&State) -> f64) -> Vec<State> {
    states.sort_unstable_by(|a, b| a.cost.cmp(&b.cost).then(score(a).total_cmp(&score(b))));
    let mut least = f64::INFINITY;
    states.retain(|state| {
        let kept = score(state) < least;
        least = least.min(score(state));
        kept
    });
    if states.len() > STATES {
        states.sort_unstable_by(|a, b| a.excess.total_cmp(&b.excess).then(a.cost.cmp(&b.cost)));
        states.truncate(STATES);
    }
    states
}

/// A choice for each item, with the least sum of scores whose sum of costs is within `budget`, or close to it.
///
/// The distance from the optimum is less than the gain of one edge, and nothing where the core was searched
/// whole. Equal inputs give equal results.
pub fn allocate(table: Choices<'_>, budget: u64) -> Result<Vec<usize>, Error> {
    table.check()?;
    let (cheapest, edges) = table.path();
    let mut taken = Solution::new(table, cheapest);
    if taken.cost > budget {
        let dearest = |item| (0..table.choices).map(move |choice| table.cost(item, choice)).max();
        let most = (0..table.items()).filter_map(dearest).sum();
        return Err(Error::Budget { budget, least: taken.cost, most });
    }
    let Some(last) = edges.iter().position(|edge| {
        let fits = edge.cost <= budget - taken.cost;
        if fits {
            taken.choose(edge.item, edge.to);
        }
        !fits
    }) else {
        return Ok(taken.chosen);
    };
    let mut filled = Solution::new(table, taken.chosen.clone());
    filled.fill(edges[last..].iter().map(|edge| edge.item), budget);
    let gained = (0..table.items()).map(|item| taken.change(item, filled.chosen[item]).1).sum();
    let slope = edges[last].slope;
    let above_bound = gained + slope * (budget - taken.cost) as f64;
    let score: f64 = (0..table.items()).map(|item| table.score(item, filled.chosen[item])).sum();
    if above_bound <= TOLERANCE * score.abs() || !taken.search(budget, slope, gained) {
        return Ok(filled.chosen);
    }
    Ok(taken.chosen)
}

/// A solution for each budget, one behind the other: each takes the edges, steepest first, that come before
/// the first one that does not fit. A larger budget lowers no item: the solutions are nested.
pub fn ladder(table: Choices<'_>, budgets: &[u64]) -> Result<Vec<usize>, Error> {
    table.check()?;
    let (cheapest, edges) = table.path();
    let least: u64 = cheapest.iter().enumerate().map(|(item, &choice)| table.cost(item, choice)).sum();
    let mut rungs = Vec::with_capacity(budgets.len() * cheapest.len());
    for &budget in budgets {
        let (mut chosen, mut cost) = (cheapest.clone(), least);
        for edge in &edges {
            cost += edge.cost;
            if cost > budget {
                break;
            }
            chosen[edge.item] = edge.to;
        }
        rungs.extend(chosen);
    }
    Ok(rungs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::philox::philox;
    use proptest::prelude::*;

    fn total(table: Choices<'_>, chosen: &[usize]) -> (u64, f64) {
        let costs = chosen.iter().enumerate().map(|(item, &choice)| table.cost(item, choice)).sum();
        let scores = chosen.iter().enumerate().map(|(item, &choice)| table.score(item, choice)).sum();
        (costs, scores)
    }

    /// The optimum, by dynamic programming over every cost up to the budget.
    fn exact(table: Choices<'_>, budget: u64) -> f64 {
        let mut best = vec![0.0; budget as usize + 1];
        for item in 0..table.items() {
            let next = |cost: usize| {
                (0..table.choices)
                    .filter_map(|choice| {
                        let rest = cost.checked_sub(table.cost(item, choice) as usize)?;
                        Some(best[rest] + table.score(item, choice))
                    })
                    .fold(f64::INFINITY, f64::min)
            };
            best = (0..best.len()).map(next).collect();
        }
        best[budget as usize]
    }

    /// Uniform numbers in 0…1, the same ones at every run.
    fn uniform(count: usize, seed: u32) -> impl Iterator<Item = f64> {
        let word = move |i: usize| philox([i as u32, 0, 0, seed], [7, 11])[0];
        (0..count).map(move |i| f64::from(word(i)) / 4_294_967_296.0)
    }

    const BITS: [u64; 6] = [2, 3, 4, 5, 6, 8];

    /// Layers as a model has them: few sizes, sensitivities spread over decades, noise of 4^-bits.
    fn layers(items: usize, spread: f64, seed: u32) -> (Vec<u64>, Vec<f64>) {
        let draws: Vec<f64> = uniform(2 * items, seed).collect();
        let (mut costs, mut scores) = (Vec::new(), Vec::new());
        for draw in draws.chunks(2) {
            let size = [1, 2, 4, 11][(draw[0] * 4.0) as usize];
            let sensitivity = size as f64 * (spread * (draw[1] - 0.5)).exp();
            costs.extend(BITS.map(|bits| size * (4 * bits + 1)));
            scores.extend(BITS.map(|bits| sensitivity * 0.25f64.powi(bits as i32)));
        }
        (costs, scores)
    }

    #[test]
    fn one_percent_from_the_optimum_for_models_of_every_size_and_spread() {
        for items in [1, 2, 3, 7, 24, 56, 200] {
            for spread in [0.0, 1.0, 4.0, 8.0] {
                let (costs, scores) = layers(items, spread, items as u32);
                let table = Choices { costs: &costs, scores: &scores, choices: BITS.len() };
                let weight: u64 = (0..items).map(|item| table.cost(item, 0) / 9).sum();
                for quarters in 9..=33 {
                    let budget = weight * quarters;
                    let chosen = allocate(table, budget).unwrap();
                    let (cost, score) = total(table, &chosen);
                    assert!(cost <= budget, "{items} {spread} {quarters}: {cost} of {budget}");
                    let best = exact(table, budget);
                    assert!(score <= 1.01 * best, "{items} {spread} {quarters}: {score} against {best}");
                }
            }
        }
    }

    proptest! {
        #[test]
        fn any_table_is_solved_within_its_budget_and_near_the_optimum(
            rows in prop::collection::vec(prop::collection::vec((0u64..60, 0.0f64..1.0), 4), 1..12),
            slack in 0u64..400,
        ) {
            let flat: Vec<(u64, f64)> = rows.concat();
            let (costs, scores): (Vec<u64>, Vec<f64>) = flat.into_iter().unzip();
            let table = Choices { costs: &costs, scores: &scores, choices: 4 };
            let least: u64 = (0..rows.len()).map(|i| (0..4).map(|c| table.cost(i, c)).min().unwrap()).sum();
            let chosen = allocate(table, least + slack).unwrap();
            let (cost, score) = total(table, &chosen);
            prop_assert!(cost <= least + slack);
            // Scores without any order: what is guaranteed is one edge, and no score is above 1.
            prop_assert!(score <= exact(table, least + slack) + 1.0);
        }
    }

    #[test]
    fn the_whole_budget_range_is_used() {
        let (costs, scores) = layers(20, 3.0, 5);
        let table = Choices { costs: &costs, scores: &scores, choices: BITS.len() };
        let least = (0..20).map(|item| table.cost(item, 0)).sum();
        let most = (0..20).map(|item| table.cost(item, 5)).sum();
        assert_eq!(allocate(table, least).unwrap(), [0; 20]);
        assert_eq!(allocate(table, most).unwrap(), [5; 20]);
        assert_eq!(allocate(table, u64::MAX).unwrap(), [5; 20]);
        let below = allocate(table, least - 1).unwrap_err();
        assert_eq!(below, Error::Budget { budget: least - 1, least, most });
        assert_eq!(
            below.to_string(),
            format!(
                "a budget of {} is infeasible: the choices cost from {least} to {most}; raise it",
                least - 1
            )
        );
    }

    #[test]
    fn a_choice_that_is_dearer_and_worse_is_never_taken() {
        // Three bits that take longer than four, as kernels have it.
        let (costs, scores) = ([1, 5, 2, 1, 5, 2], [8.0, 3.0, 2.0, 8.0, 3.0, 2.0]);
        let table = Choices { costs: &costs, scores: &scores, choices: 3 };
        assert_eq!(allocate(table, 100).unwrap(), [2, 2]);
        assert_eq!(allocate(table, 3).unwrap(), [2, 0]);
    }

    #[test]
    fn a_ladder_is_nested_and_each_rung_is_optimal_for_what_it_costs() {
        let (costs, scores) = layers(40, 4.0, 3);
        let table = Choices { costs: &costs, scores: &scores, choices: BITS.len() };
        let weight: u64 = (0..40).map(|item| table.cost(item, 0) / 9).sum();
        let budgets: Vec<u64> = (0..16).map(|rung| weight * (33 - 24 * rung / 15)).collect();
        let rungs = ladder(table, &budgets).unwrap();
        let rungs: Vec<&[usize]> = rungs.chunks(40).collect();
        assert_eq!((rungs[0], rungs[15]), (&[5; 40][..], &[0; 40][..]));
        for (pair, budget) in rungs.windows(2).zip(&budgets) {
            assert!(pair[0].iter().zip(pair[1]).all(|(high, low)| high >= low));
            let (cost, score) = total(table, pair[0]);
            assert!(cost <= *budget);
            assert!(score <= exact(table, cost) * (1.0 + 1e-12));
        }
    }

    #[test]
    fn nothing_to_allocate_costs_nothing() {
        let table = Choices { costs: &[], scores: &[], choices: 3 };
        assert_eq!(allocate(table, 0).unwrap(), [0; 0]);
        assert_eq!(ladder(table, &[0, 1]).unwrap(), [0; 0]);
    }

    #[test]
    fn damaged_tables_are_refused() {
        let (costs, scores) = ([1, 2, 3, 4], [4.0, 3.0, f64::NAN, 1.0]);
        for (costs, scores, choices, error) in [
            (&costs[..], &scores[..], 2, Error::Score { item: 1, choice: 0 }),
            (&costs[..3], &scores[..], 2, Error::Table { costs: 3, scores: 4, choices: 2 }),
            (&costs[..3], &scores[..3], 2, Error::Table { costs: 3, scores: 3, choices: 2 }),
            (&costs[..0], &scores[..0], 0, Error::Table { costs: 0, scores: 0, choices: 0 }),
        ] {
            let table = Choices { costs, scores, choices };
            assert_eq!(allocate(table, 100).unwrap_err(), error);
            assert_eq!(ladder(table, &[100]).unwrap_err(), error);
        }
    }
}
