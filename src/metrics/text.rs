//! The two text formats of a scrape: Prometheus 0.0.4, and OpenMetrics 1.0 for who asks for it.
//!
//! The crate writes the first. OpenMetrics differs in that a counter's family is named without `_total`, and in that it
//! ends with a line that says so, which is how a scraper tells a whole answer from half of one.

use std::fmt::Write as _;

use prometheus::TextEncoder;
use prometheus::proto::{Metric, MetricFamily, MetricType};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Prometheus,
    OpenMetrics,
}

impl Format {
    /// What an `Accept` header asks for.
    pub fn accepted(header: &str) -> Format {
        match header.contains("application/openmetrics-text") {
            true => Format::OpenMetrics,
            false => Format::Prometheus,
        }
    }

    pub fn content_type(self) -> &'static str {
        match self {
            Format::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
            Format::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

pub fn render(families: &[MetricFamily], format: Format) -> String {
    let mut out = String::new();
    match format {
        Format::Prometheus => {
            let families: Vec<MetricFamily> =
                families.iter().filter(|family| !family.get_metric().is_empty()).cloned().collect();
            if let Err(error) = TextEncoder::new().encode_utf8(&families, &mut out) {
                tracing::error!(%error, "metrics cannot be written");
            }
        }
        Format::OpenMetrics => {
            families.iter().for_each(|family| put_family(&mut out, family));
            out.push_str("# EOF\n");
        }
    }
    out
}

fn put_family(out: &mut String, family: &MetricFamily) {
    let (kind, name) = match family.get_field_type() {
        MetricType::COUNTER => ("counter", family.name().strip_suffix("_total").unwrap_or(family.name())),
        MetricType::HISTOGRAM => ("histogram", family.name()),
        _ => ("gauge", family.name()),
    };
    let _ = writeln!(out, "# TYPE {name} {kind}\n# HELP {name} {}", escaped(family.help()));
    for metric in family.get_metric() {
        match family.get_field_type() {
            MetricType::COUNTER => put_value(out, name, "_total", metric, None, metric.get_counter().get_value()),
            MetricType::HISTOGRAM => put_histogram(out, name, metric),
            _ => put_value(out, name, "", metric, None, metric.get_gauge().get_value()),
        }
    }
}

fn put_histogram(out: &mut String, name: &str, metric: &Metric) {
    let histogram = metric.get_histogram();
    let count = histogram.get_sample_count() as f64;
    for bucket in histogram.get_bucket().iter().filter(|bucket| bucket.upper_bound().is_finite()) {
        let bound = format!("{:?}", bucket.upper_bound());
        put_value(out, name, "_bucket", metric, Some(&bound), bucket.cumulative_count() as f64);
    }
    put_value(out, name, "_bucket", metric, Some("+Inf"), count);
    put_value(out, name, "_sum", metric, None, histogram.get_sample_sum());
    put_value(out, name, "_count", metric, None, count);
}

fn put_value(out: &mut String, name: &str, suffix: &str, metric: &Metric, bound: Option<&str>, value: f64) {
    let labels = metric.get_label().iter().map(|label| (label.name(), label.value()));
    let labels: Vec<String> = labels
        .chain(bound.map(|bound| ("le", bound)))
        .map(|(label, value)| format!("{label}=\"{}\"", escaped(value)))
        .collect();
    let _ = match labels.is_empty() {
        true => writeln!(out, "{name}{suffix} {value}"),
        false => writeln!(out, "{name}{suffix}{{{}}} {value}", labels.join(",")),
    };
}

fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus::{HistogramOpts, HistogramVec, IntCounterVec, Opts, Registry};

    #[test]
    fn openmetrics_names_counters_without_total_and_says_where_it_ends() {
        let registry = Registry::new();
        let counters = IntCounterVec::new(Opts::new("a_total", "Counts."), &["queue"]).unwrap();
        counters.with_label_values(&["x\"y\\z"]).inc();
        registry.register(Box::new(counters)).unwrap();
        let options = HistogramOpts::new("b_seconds", "Takes.").buckets(vec![0.5, 1.0]);
        let histograms = HistogramVec::new(options, &[]).unwrap();
        histograms.with_label_values::<&str>(&[]).observe(0.75);
        registry.register(Box::new(histograms)).unwrap();
        let text = render(&registry.gather(), Format::OpenMetrics);
        let expected = "# TYPE a counter\n# HELP a Counts.\na_total{queue=\"x\\\"y\\\\z\"} 1\n\
                        # TYPE b_seconds histogram\n# HELP b_seconds Takes.\nb_seconds_bucket{le=\"0.5\"} 0\n\
                        b_seconds_bucket{le=\"1.0\"} 1\nb_seconds_bucket{le=\"+Inf\"} 1\nb_seconds_sum 0.75\n\
                        b_seconds_count 1\n# EOF\n";
        assert_eq!(text, expected);
    }

    #[test]
    fn a_scraper_gets_the_format_that_it_asks_for() {
        let asked = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5";
        assert_eq!(Format::accepted(asked), Format::OpenMetrics);
        assert_eq!(Format::accepted("*/*"), Format::Prometheus);
    }
}
