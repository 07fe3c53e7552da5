//! Threads: somebody else's team, if one is lent, else a pool that grows on demand. Both have the caller as one
//! of their workers and survive `fork`.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::Shape;
use crate::scheme::Scheme;

/// The workers besides the callers. Grown by replacement: running calls keep the pool they began with.
static POOL: Mutex<Option<Arc<ThreadPool>>> = Mutex::new(None);

/// Calls a closure on that many threads at once, the caller's among them, and returns when all are done.
pub type Team = fn(usize, &(dyn Fn() + Sync));

/// The team that was lent.
static TEAM: OnceLock<Team> = OnceLock::new();
/// Whether this process is a child that did not inherit the team's threads.
static FORKED: AtomicBool = AtomicBool::new(false);

/// Uses the threads of `team` from now on: two pools on the same cores would wait for each other. The first team
/// stays.
pub fn lend_team(team: Team) {
    TEAM.get_or_init(|| team);
}

/// The team to use now, if any.
fn team() -> Option<Team> {
    TEAM.get().copied().filter(|_| !FORKED.load(Ordering::Relaxed) && Trust::now(|trust| trust.given()))
}

/// How far the team is trusted to be awake.
///
/// Its threads may sleep, or wait for a core that somebody else keeps busy, and the caller waits for them even
/// where it has done all the work itself. Waking sleepers costs one such stall, so one is forgiven; after a
/// second one in a row the pool does the work for so long that stalls take a twentieth of the time at most.
struct Trust {
    stalled: bool,
    withdrawn_until: Option<Instant>,
}

impl Trust {
    /// A wait that is no longer the price of meeting at the end of the work.
    const STALL: Duration = Duration::from_micros(300);
    const PAUSE_A_STALL: u32 = 40;

    /// What `ask` says of the trust at this moment.
    fn now<T>(ask: impl FnOnce(&mut Self) -> T) -> T {
        static TRUST: Mutex<Trust> = Mutex::new(Trust { stalled: false, withdrawn_until: None });
        ask(&mut TRUST.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn given(&mut self) -> bool {
        self.withdrawn_until = self.withdrawn_until.filter(|until| Instant::now() < *until);
        self.withdrawn_until.is_none()
    }

    /// Takes note of the time between the end of the work and the team's return.
    fn learn(&mut self, waited: Duration) {
        let stalls = waited > Self::STALL;
        if stalls && self.stalled {
            self.withdrawn_until = Some(Instant::now() + waited * Self::PAUSE_A_STALL);
        }
        self.stalled = stalls && !self.stalled;
    }
}

/// Forgets all threads: to be called in the child after `fork`, where they do not exist.
pub fn after_fork() {
    FORKED.store(true, Ordering::Relaxed);
    if let Some(mut pool) = lock() {
        // Dropping it would signal threads that the child does not have.
        std::mem::forget(pool.take());
    }
}

/// The pool's lock, or `None` if it stays taken: a fork may have copied it in the locked state.
fn lock() -> Option<MutexGuard<'static, Option<Arc<ThreadPool>>>> {
    for _ in 0..1000 {
        match POOL.try_lock() {
            Ok(guard) => return Some(guard),
            Err(TryLockError::Poisoned(guard)) => return Some(guard.into_inner()),
            Err(TryLockError::WouldBlock) => std::thread::yield_now(),
        }
    }
    None
}

/// A pool of at least `workers` threads, or `None` if the system grants no more.
fn pool(workers: usize) -> Option<Arc<ThreadPool>> {
    let mut pool = lock()?;
    if let Some(pool) = pool.as_ref().filter(|pool| pool.current_num_threads() >= workers) {
        return Some(Arc::clone(pool));
    }
    let name = |i| format!("turboquant-{i}");
    let grown = Arc::new(ThreadPoolBuilder::new().num_threads(workers).thread_name(name).build().ok()?);
    *pool = Some(Arc::clone(&grown));
    Some(grown)
}

/// Tasks that threads claim. Each begins with a run of its own, as long as the same threads come the same from call
/// to call: a weight that is met again lies in the caches of the core that met it before. Whoever is through helps
/// with the runs of others.
struct Queue<T> {
    tasks: Vec<Mutex<Option<T>>>,
    runs: Vec<Run>,
}

/// Neighbouring tasks. Threads count each on a cache line that is not another's.
#[repr(align(64))]
struct Run {
    next: AtomicUsize,
    end: usize,
}

impl<T> Queue<T> {
    fn new(tasks: Vec<T>, threads: usize) -> Self {
        let bound = |run: usize| run * tasks.len() / threads;
        let runs = (0..threads).map(|run| Run { next: bound(run).into(), end: bound(run + 1) }).collect();
        Self { tasks: tasks.into_iter().map(|task| Mutex::new(Some(task))).collect(), runs }
    }

    /// The next task of the run at `seat`, else of those behind it.
    fn claim(&self, seat: usize) -> Option<T> {
        let runs = self.runs.iter().cycle().skip(seat % self.runs.len()).take(self.runs.len());
        runs.flat_map(|run| {
            let left = run.next.load(Ordering::Relaxed) < run.end;
            left.then(|| run.next.fetch_add(1, Ordering::Relaxed)).filter(|task| *task < run.end)
        })
        .find_map(|task| self.tasks[task].lock().ok()?.take())
    }
}

/// A number of this thread's own among those of its team or pool; the first caller has 0.
fn seat() -> usize {
    static SEATS: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static SEAT: usize = SEATS.fetch_add(1, Ordering::Relaxed);
    }
    rayon::current_thread_index().map_or_else(|| SEAT.with(|seat| *seat), |index| index + 1)
}

/// Calls `work` once for each task, on `threads` threads of which the caller is one.
///
/// With one thread or one task nothing is spawned.
pub(crate) fn for_each<T: Send>(threads: usize, tasks: Vec<T>, work: impl Fn(T) + Sync) {
    let workers = threads.min(tasks.len());
    if workers <= 1 {
        tasks.into_iter().for_each(work);
        return;
    }
    let queue = Queue::new(tasks, workers);
    let (began, ended) = (Instant::now(), AtomicU64::new(0));
    let drain = || {
        let (seat, mut end) = (seat(), Duration::ZERO);
        while let Some(task) = queue.claim(seat) {
            work(task);
            end = began.elapsed();
        }
        // Who came too late for any task says nothing of their end.
        ended.fetch_max(end.as_nanos() as u64, Ordering::Relaxed);
    };
    if let Some(team) = team() {
        // All of it, whatever the tasks: a team that changes its size ends threads and starts others.
        team(threads, &drain);
        let ended = Duration::from_nanos(ended.into_inner());
        Trust::now(|trust| trust.learn(began.elapsed().saturating_sub(ended)));
    } else if let Some(pool) = pool(workers - 1) {
        pool.in_place_scope(|scope| {
            for _ in 1..workers {
                scope.spawn(|_| drain());
            }
            drain();
        });
    } else {
        drain();
    }
}

/// Groups `groups` of each row of `rows`: a run of whole rows, or a part of a single row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) row: usize,
    pub(crate) rows: usize,
    pub(crate) group: usize,
    pub(crate) groups: usize,
    /// Index within the row of the first element.
    pub(crate) begin: usize,
    /// Index within the row behind the last element.
    pub(crate) end: usize,
}

impl Span {
    /// Number of groups in all its rows.
    pub(crate) fn total_groups(&self) -> usize {
        self.rows * self.groups
    }

    /// Number of elements in all its rows.
    pub(crate) fn len(&self) -> usize {
        self.rows * (self.end - self.begin)
    }

    /// Bytes of its rows in a plane of that width.
    pub(crate) fn plane_bytes(&self, width: u32) -> usize {
        self.rows * crate::scheme::row_bytes(self.end - self.begin, width)
    }
}

/// Elements worth waking a thread for.
const MIN_SPAN: usize = 1 << 16;
/// Spans a thread, so that a slow one can be helped out.
const SPANS_A_THREAD: usize = 4;
/// Parts of a row are cut at multiples of this many groups: whole bytes in every plane.
const GROUPS_A_CUT: usize = 16;

/// Cuts a tensor into spans for `threads` threads, in row-major order.
pub(crate) fn spans(shape: Shape, group: usize, threads: usize) -> Vec<Span> {
    let Shape { rows, k } = shape;
    if shape.is_empty() {
        return Vec::new();
    }
    let groups = k.div_ceil(group);
    let target = if threads <= 1 { usize::MAX } else { shape.len().div_ceil(threads * SPANS_A_THREAD) };
    let target = target.max(MIN_SPAN);
    if k <= target || groups <= GROUPS_A_CUT {
        let step = (target / k).clamp(1, rows);
        let span = |row| Span { row, rows: step.min(rows - row), group: 0, groups, begin: 0, end: k };
        return (0..rows).step_by(step).map(span).collect();
    }
    let step = (target / group).max(1).next_multiple_of(GROUPS_A_CUT);
    let cut = |row, first: usize| {
        let groups = step.min(groups - first);
        let (begin, end) = (first * group, ((first + groups) * group).min(k));
        Span { row, rows: 1, group: first, groups, begin, end }
    };
    (0..rows).flat_map(|row| (0..groups).step_by(step).map(move |first| cut(row, first))).collect()
}

/// Spans that follow the groups of a scheme.
pub(crate) fn group_spans(shape: Shape, scheme: &Scheme, threads: usize) -> Vec<Span> {
    spans(shape, scheme.group_len(shape.k), threads)
}

/// The first `len` elements of what is left of a buffer, which then begins behind them.
pub(crate) fn take<'a, T>(rest: &mut &'a [T], len: usize) -> &'a [T] {
    let (head, tail) = rest.split_at(len);
    *rest = tail;
    head
}

/// [`take`] for memory to write to.
pub(crate) fn take_mut<'a, T>(rest: &mut &'a mut [T], len: usize) -> &'a mut [T] {
    let (head, tail) = std::mem::take(rest).split_at_mut(len);
    *rest = tail;
    head
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn every_task_runs_once_for_any_number_of_threads() {
        for threads in [0, 1, 2, 7] {
            let sum = AtomicUsize::new(0);
            for_each(threads, (1..=100).collect(), |i| {
                sum.fetch_add(i, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 5050, "{threads} threads");
        }
        after_fork();
        for_each(3, vec![(), ()], |()| ());
    }

    #[test]
    fn each_seat_begins_with_a_run_of_its_own_then_helps() {
        let queue = Queue::new((0..7).collect(), 3);
        let claims = |seat: usize, count: usize| -> Vec<Option<usize>> {
            (0..count).map(|_| queue.claim(seat)).collect()
        };
        assert_eq!(claims(1, 1), [Some(2)]);
        assert_eq!(claims(3, 3), [Some(0), Some(1), Some(3)], "seats are taken in turn");
        assert_eq!(claims(2, 4), [Some(4), Some(5), Some(6), None]);
        assert_eq!(claims(0, 1), [None]);
    }

    #[test]
    fn a_team_that_stalls_twice_rests_for_a_while() {
        let mut trust = Trust { stalled: false, withdrawn_until: None };
        let (quick, slow) = (Duration::from_micros(20), Duration::from_millis(5));
        for waited in [quick, slow, quick, slow] {
            trust.learn(waited);
            assert!(trust.given());
        }
        trust.learn(slow);
        assert!(!trust.given());
        trust.withdrawn_until = Some(Instant::now());
        assert!(trust.given(), "and is asked again");
    }

    #[test]
    fn spans_cover_every_element_once_and_in_order() {
        for (rows, k, group) in
            [(1, 1 << 20, 64), (3, 300_001, 9), (5000, 77, 64), (1, 1 << 19, 1 << 19), (0, 4, 8)]
        {
            for threads in [1, 2, 7] {
                let mut next = 0;
                for span in spans(Shape { rows, k }, group, threads) {
                    assert_eq!(next, span.row * k + span.begin);
                    assert!(span.begin % 8 == 0 && span.begin == span.group * group);
                    next += span.len();
                }
                assert_eq!(next, rows * k);
            }
        }
    }
}
