//! The text against the rules of OpenMetrics 1.0, by a reader that takes nothing else.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "test code")]

mod openmetrics;

use openmetrics::{Metric, read};
use vmm_api::metrics::{Exposition, Family, Kind, MetricsFault, Number, Value};
use vmm_device_model::metrics::{
    Family as DeviceFamily, Kind as DeviceKind, LatencyCounter, Measures, Value as DeviceValue,
};

const COUNTER: Family = Family::of(Kind::Counter, "vmm_x", "", "Counts.");
const BYTES: Family = Family::of(Kind::Gauge, "vmm_memory_bytes", "bytes", "Size of \"it\", \\ and\nmore.");
const LATENCY: Family = Family::of(Kind::Histogram, "vmm_wait_seconds", "seconds", "Waits.");
const BUILD: Family = Family::of(Kind::Info, "vmm_build", "", "The program.");

fn histogram(counts: &[u64]) -> Value {
    Value::Histogram { bounds: vec![5e-6, 0.5, 2.0], counts: counts.to_vec(), sum: 12.5 }
}

#[track_caller]
fn read_all(page: &Exposition) -> Vec<Metric> {
    let text = page.text().unwrap();
    read(&text).unwrap_or_else(|error| panic!("{error}:\n{text}"))
}

#[test]
fn each_kind_is_written_as_the_format_says() {
    let mut page = Exposition::new();
    page.sample(&COUNTER, &[("queue", "1"), ("device", "_disk0")], Value::count(3));
    page.sample(&LATENCY, &[("queue", "1")], histogram(&[1, 0, 2, 4]));
    page.sample(&BYTES, &[], Value::gauge(4096));
    page.sample(&BUILD, &[("version", "0.1")], Value::Info);
    // Samples of one family come together, whatever their order was.
    page.sample(&COUNTER, &[], Value::Counter(Number::Float(0.5)));
    let text = "\
# TYPE vmm_x counter
# HELP vmm_x Counts.
vmm_x_total{queue=\"1\",device=\"_disk0\"} 3
vmm_x_total 0.5
# TYPE vmm_wait_seconds histogram
# UNIT vmm_wait_seconds seconds
# HELP vmm_wait_seconds Waits.
vmm_wait_seconds_bucket{queue=\"1\",le=\"5e-06\"} 1
vmm_wait_seconds_bucket{queue=\"1\",le=\"0.5\"} 1
vmm_wait_seconds_bucket{queue=\"1\",le=\"2.0\"} 3
vmm_wait_seconds_bucket{queue=\"1\",le=\"+Inf\"} 7
vmm_wait_seconds_count{queue=\"1\"} 7
vmm_wait_seconds_sum{queue=\"1\"} 12.5
# TYPE vmm_memory_bytes gauge
# UNIT vmm_memory_bytes bytes
# HELP vmm_memory_bytes Size of \\\"it\\\", \\\\ and\\nmore.
vmm_memory_bytes 4096
# TYPE vmm_build info
# HELP vmm_build The program.
vmm_build_info{version=\"0.1\"} 1
# EOF
";
    assert_eq!(page.text().unwrap(), text);
    let metrics = read_all(&page);
    assert_eq!(metrics[2].help, BYTES.help);
    assert_eq!(COUNTER.series(), "vmm_x_total");
    assert_eq!(BUILD.series(), "vmm_build_info");
    assert_eq!(LATENCY.series(), "vmm_wait_seconds");
}

#[test]
fn nothing_is_a_text_too_and_so_is_a_family_without_samples() {
    assert_eq!(Exposition::new().text().unwrap(), "# EOF\n");
    let mut page = Exposition::new();
    page.family(&COUNTER);
    assert!(read_all(&page)[0].samples.is_empty());
}

#[test]
fn labels_hold_any_characters() {
    let hostile = "a\"b\\c\nd\r\t\u{0}\u{85}{}=, # EOF\n\u{10ffff}\\n\\\"";
    let mut page = Exposition::new();
    page.sample(&COUNTER, &[("path", hostile), ("empty", "")], Value::count(1));
    let metrics = read_all(&page);
    assert_eq!(
        metrics[0].samples[0].labels,
        [("path".into(), hostile.into()), ("empty".into(), String::new())]
    );
}

#[test]
fn what_devices_measure_is_a_text() {
    static READS: DeviceFamily =
        DeviceFamily { name: "vmm_reads", help: "Reads.", unit: "", kind: DeviceKind::Counter };
    static WAITS: DeviceFamily = DeviceFamily {
        name: "vmm_waits_seconds",
        help: "Waits.",
        unit: "seconds",
        kind: DeviceKind::Histogram,
    };
    let mut page = Exposition::new();
    for device in ["_disk0", "_disk1"] {
        let latency = LatencyCounter::default();
        latency.count(std::time::Duration::from_micros(7));
        let mut measures = Measures::of_device(device);
        for queue in ["0", "1"] {
            measures.sample(&READS, &[("queue", queue)], DeviceValue::Counter(5));
            measures.sample(&WAITS, &[("queue", queue)], latency.get().value());
        }
        page.devices(measures.into_parts().1);
    }
    let metrics = read_all(&page);
    let names: Vec<&str> = metrics.iter().map(|metric| metric.name.as_str()).collect();
    assert_eq!(names, ["vmm_reads", "vmm_waits_seconds"]);
    assert_eq!(metrics[0].samples.len(), 4);
    assert_eq!(metrics[1].samples.len(), 4 * (17 + 2));
}

#[test]
fn what_the_format_does_not_allow_has_no_text() {
    use MetricsFault as Fault;
    let fault = |fill: &dyn Fn(&mut Exposition)| {
        let mut page = Exposition::new();
        fill(&mut page);
        page.text().map(|text| panic!("{text}")).unwrap_err().fault
    };
    let named = |kind, name, unit| fault(&|page| page.family(&Family::of(kind, name, unit, "")));
    for name in ["", "1x", "a-b", "a.b", "a b", "ä", "a:b"] {
        assert_eq!(named(Kind::Gauge, name, ""), Fault::Name, "{name}");
    }
    assert_eq!(named(Kind::Counter, "x_total", ""), Fault::Suffix("_total"));
    assert_eq!(named(Kind::Gauge, "x_count", ""), Fault::Suffix("_count"));
    for name in ["x_byte", "xbytes", "bytes"] {
        assert_eq!(named(Kind::Gauge, name, "bytes"), Fault::Unit("bytes".into()), "{name}");
    }
    assert_eq!(named(Kind::Info, "x_bytes", "bytes"), Fault::InfoUnit);

    let labelled = |family: &Family, labels: &[(&'static str, &str)], value: &Value| {
        fault(&|page| page.sample(family, labels, value.clone()))
    };
    let one = Value::count(1);
    for label in ["", "a-b", "__a", "1", "a:b"] {
        assert_eq!(labelled(&COUNTER, &[(label, "")], &one), Fault::Label(label.into()), "{label}");
    }
    assert_eq!(labelled(&LATENCY, &[("le", "")], &histogram(&[0; 4])), Fault::Label("le".into()));
    assert_eq!(labelled(&COUNTER, &[("a", "1"), ("a", "2")], &one), Fault::LabelTwice("a".into()));
    assert_eq!(labelled(&COUNTER, &[], &Value::gauge(1)), Fault::Kind("gauge"));
    for count in [-1.0, f64::NAN] {
        let value = Value::Counter(Number::Float(count));
        assert_eq!(labelled(&COUNTER, &[], &value), Fault::Count(count.to_string()));
    }
    let ranges = |bounds: &[f64], counts: &[u64], sum| {
        let value = Value::Histogram { bounds: bounds.to_vec(), counts: counts.to_vec(), sum };
        labelled(&LATENCY, &[], &value)
    };
    for (bounds, counts, sum) in [
        (&[1.0, 1.0][..], &[0; 3][..], 0.0),
        (&[2.0, 1.0], &[0; 3], 0.0),
        (&[1.0, f64::INFINITY], &[0; 3], 0.0),
        (&[f64::NAN], &[0; 2], 0.0),
        (&[-1.0], &[0; 2], 0.0),
        (&[1.0], &[0; 2], -1.0),
        (&[1.0], &[0; 2], f64::NAN),
        (&[1.0], &[0; 1], 0.0),
        (&[1.0], &[0; 3], 0.0),
        (&[], &[], 0.0),
    ] {
        assert_eq!(ranges(bounds, counts, sum), Fault::Ranges, "{bounds:?} {counts:?} {sum}");
    }
    let twice = fault(&|page| {
        page.sample(&COUNTER, &[("a", "1"), ("b", "2")], Value::count(1));
        page.sample(&COUNTER, &[("b", "2"), ("a", "1")], Value::count(1));
    });
    assert_eq!(twice, Fault::SampleTwice);
}

#[test]
fn one_name_is_one_family() {
    let mut page = Exposition::new();
    page.sample(&COUNTER, &[], Value::count(1));
    page.sample(&Family { kind: Kind::Gauge, ..COUNTER }, &[], Value::gauge(1));
    assert_eq!(page.text().unwrap_err().fault, MetricsFault::Kind("gauge"));
    // What a sample of the one is called cannot be another's name.
    let mut page = Exposition::new();
    page.family(&BUILD);
    page.family(&Family::of(Kind::Gauge, "vmm_build_info", "", ""));
    let error = page.text().unwrap_err();
    assert_eq!(
        error.to_string(),
        "metric \"vmm_build_info\": the name ends with \"_info\", which samples of some kind add"
    );
}

#[test]
fn the_reader_of_this_test_is_strict() {
    let good = "# TYPE a counter\n# HELP a x\na_total{l=\"v\"} 1\n# EOF\n";
    assert_eq!(read(good).unwrap().len(), 1);
    for bad in [
        "",
        "# TYPE a counter\na_total 1\n",
        "# EOF",
        "# EOF\n\n",
        "# EOF\n# EOF\n",
        "\n# EOF\n",
        "# TYPE a counter\na 1\n# EOF\n",
        "# TYPE a counter\na_total -1\n# EOF\n",
        "# TYPE a counter\na_total 1 \n# EOF\n",
        "# TYPE a counter\na_total  1\n# EOF\n",
        "# TYPE a counter\na_total{} 1\n# EOF\n",
        "# TYPE a counter\na_total{l=\"v\",} 1\n# EOF\n",
        "# TYPE a counter\na_total{l=\"\\x\"} 1\n# EOF\n",
        "# TYPE a counter\na_total{l=\"v\",l=\"w\"} 1\n# EOF\n",
        "# TYPE a counter\na_total 1\na_total 1\n# EOF\n",
        "# TYPE a counter\na_total one\n# EOF\n",
        "# TYPE a gauge\na 1\n# TYPE b gauge\nb 1\na 2\n# EOF\n",
        "# TYPE a gauge\n# TYPE a gauge\n# EOF\n",
        "# TYPE a gauge\na 1\n# HELP a late\n# EOF\n",
        "# TYPE a gauge\n# UNIT a bytes\n# EOF\n",
        "# TYPE a gauge\n# HELP a \"x\"\n# EOF\n",
        "# TYPE a info\na_info 2\n# EOF\n",
        "a_total 1\n# EOF\n",
        "# TYPE a histogram\na_bucket{le=\"1.0\"} 1\na_count 1\na_sum 1.0\n# EOF\n",
        "# TYPE a histogram\na_bucket{le=\"1.0\"} 2\na_bucket{le=\"+Inf\"} 1\na_count 1\na_sum 1.0\n# EOF\n",
        "# TYPE a histogram\na_bucket{le=\"+Inf\"} 1\na_count 2\na_sum 1.0\n# EOF\n",
    ] {
        assert!(read(bad).is_err(), "{bad}");
    }
}
