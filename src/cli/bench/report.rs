//! What a run of `goflow bench` found, as text and as JSON; CPU time from `/proc`.

use std::fmt::Write;

use hdrhistogram::Histogram;
use serde::Serialize;

use super::load::{Measured, Phase, Tally};
use super::{Mode, Options};

/// A tick of `/proc/<pid>/stat`: Linux shows a hundred a second to programs, whatever the kernel counts.
const TICK_US: u64 = 10_000;

/// A run.
#[derive(Debug, Serialize)]
pub struct Report {
    mode: &'static str,
    jobs: u64,
    payload_bytes: u32,
    producers: u32,
    workers: u32,
    pipeline: u32,
    batch: u32,
    rate: u64,
    pub phases: Vec<PhaseReport>,
}

#[derive(Debug, Serialize)]
pub struct PhaseReport {
    name: &'static str,
    /// Jobs that the phase carried to its end.
    jobs: u64,
    /// Jobs that it should have: the others were lost, or never answered.
    missing: u64,
    seconds: f64,
    jobs_per_s: f64,
    /// From enqueue to delivery; nothing in a phase without workers.
    latency_us: Option<Spread>,
    /// From a write to the last answer to it.
    round_trip_us: Option<Spread>,
    cpu_us_per_job: Vec<CpuShare>,
    errors: u64,
    first_error: Option<String>,
    leases_lost: u64,
    connections_broken: u64,
}

#[derive(Debug, Serialize)]
struct Spread {
    p50: u64,
    p99: u64,
    p999: u64,
    max: u64,
}

#[derive(Debug, Serialize)]
struct CpuShare {
    /// 0 is the generator itself.
    pid: u32,
    us: f64,
}

impl Spread {
    fn of(histogram: &Histogram<u64>) -> Option<Spread> {
        (!histogram.is_empty()).then(|| Spread {
            p50: histogram.value_at_quantile(0.5),
            p99: histogram.value_at_quantile(0.99),
            p999: histogram.value_at_quantile(0.999),
            max: histogram.max(),
        })
    }
}

impl PhaseReport {
    pub fn new(phase: Phase, wanted: u64, tally: &Tally, measured: Measured, cpu: Vec<CpuTime>) -> PhaseReport {
        let seconds = tally.elapsed().as_secs_f64();
        let jobs = if phase.workers == 0 { tally.enqueued() } else { tally.finished() };
        let share =
            |cpu: &CpuTime| CpuShare { pid: cpu.pid, us: cpu.ticks as f64 * TICK_US as f64 / jobs.max(1) as f64 };
        PhaseReport {
            name: phase.name,
            jobs,
            missing: wanted.saturating_sub(jobs),
            seconds,
            jobs_per_s: jobs as f64 / seconds.max(1e-9),
            latency_us: Spread::of(&measured.latency),
            round_trip_us: Spread::of(&measured.round_trip),
            cpu_us_per_job: cpu.iter().map(share).collect(),
            errors: measured.errors,
            first_error: measured.first_error,
            leases_lost: measured.leases_lost,
            connections_broken: measured.broken,
        }
    }
}

impl Report {
    pub fn new(options: &Options) -> Report {
        Report {
            mode: match options.mode {
                Mode::Goflow => "goflow",
                Mode::List => "list",
            },
            jobs: options.jobs,
            payload_bytes: options.payload,
            producers: options.producers(),
            workers: options.workers(),
            pipeline: options.pipeline,
            batch: options.batch,
            rate: options.rate,
            phases: Vec::new(),
        }
    }

    /// Nothing is missing and no connection broke.
    pub fn is_complete(&self) -> bool {
        self.phases.iter().all(PhaseReport::is_complete)
    }

    pub fn json(&self) -> String {
        // Numbers and texts only: this cannot fail.
        serde_json::to_string(self).unwrap_or_default() + "\n"
    }

    pub fn text(&self) -> String {
        let mut text = format!(
            "{} jobs of {} bytes, {} producers, {} workers, pipeline {}, batch {}\n",
            self.jobs, self.payload_bytes, self.producers, self.workers, self.pipeline, self.batch
        );
        for phase in &self.phases {
            // Writing to a String cannot fail.
            let _ = phase.write(&mut text);
        }
        text
    }
}

impl PhaseReport {
    pub fn is_complete(&self) -> bool {
        self.missing == 0 && self.connections_broken == 0
    }

    fn write(&self, text: &mut String) -> std::fmt::Result {
        writeln!(text, "{}: {:.0} jobs/s ({} in {:.2} s)", self.name, self.jobs_per_s, self.jobs, self.seconds)?;
        for (what, spread) in [("enqueue to delivery", &self.latency_us), ("round trip", &self.round_trip_us)] {
            if let Some(Spread { p50, p99, p999, max }) = spread {
                writeln!(text, "  {what}: p50 {p50} µs, p99 {p99} µs, p99.9 {p999} µs, max {max} µs")?;
            }
        }
        for CpuShare { pid, us } in &self.cpu_us_per_job {
            match pid {
                0 => writeln!(text, "  CPU of this generator: {us:.2} µs a job")?,
                pid => writeln!(text, "  CPU of process {pid}: {us:.2} µs a job")?,
            }
        }
        if let Some(first) = &self.first_error {
            writeln!(text, "  errors: {}, the first: {first}", self.errors)?;
        }
        for (what, count) in [
            ("jobs missing", self.missing),
            ("leases lost", self.leases_lost),
            ("connections broken", self.connections_broken),
        ] {
            if count > 0 {
                writeln!(text, "  {what}: {count}")?;
            }
        }
        Ok(())
    }
}

/// CPU time of one process, user and system, all threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuTime {
    pid: u32,
    ticks: u64,
}

impl CpuTime {
    /// Of this process and the given ones; one that is not there counts 0.
    pub fn all(pids: &[u32]) -> Vec<CpuTime> {
        let own = CpuTime { pid: 0, ticks: read_ticks("self") };
        let others = pids.iter().map(|&pid| CpuTime { pid, ticks: read_ticks(&pid.to_string()) });
        std::iter::once(own).chain(others).collect()
    }

    pub fn since(before: &[CpuTime], pids: &[u32]) -> Vec<CpuTime> {
        let spent = |(now, before): (CpuTime, &CpuTime)| CpuTime {
            pid: now.pid,
            ticks: now.ticks.saturating_sub(before.ticks),
        };
        CpuTime::all(pids).into_iter().zip(before).map(spent).collect()
    }
}

fn read_ticks(process: &str) -> u64 {
    std::fs::read_to_string(format!("/proc/{process}/stat")).ok().and_then(|stat| ticks_of(&stat)).unwrap_or(0)
}

/// Fields 14 and 15. The second is the program's name in brackets and may hold spaces and brackets itself.
fn ticks_of(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_ascii_whitespace().skip(11);
    Some(fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_read_behind_any_program_name() {
        let stat = "7 (a) b (c) S 1 2 3 4 5 6 7 8 9 10 30 12 13 14";
        assert_eq!(ticks_of(stat), Some(42));
        assert_eq!(ticks_of("7 (x) S 1"), None);
        assert!(std::fs::read_to_string("/proc/self/stat").is_ok_and(|stat| ticks_of(&stat).is_some()));
    }
}
