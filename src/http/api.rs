//! Jobs over HTTP: each request becomes the words of a command and goes the way that every command goes, so the rules, the
//! bounds and the errors are the same.
//!
//! | request | command |
//! | --- | --- |
//! | `POST /v1/queues/{queue}/jobs` | `GOFLOW.ENQUEUE`, once for each job of the body |
//! | `GET /v1/queues/{queue}/jobs/{id}` | `GOFLOW.JOB` |
//! | `GET /v1/queues/{queue}` | `GOFLOW.STATS` |
//! | `GET /v1/queues` | `GOFLOW.QUEUES` |
//!
//! A body of the type `application/json` is one job or an array of jobs ([`FIELDS`]); any other body is a payload as it is, with
//! the fields in the query. A new field is a row of the table and a property in `openapi.json`.

use std::future::poll_fn;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::header::{ALLOW, AUTHORIZATION, CONTENT_TYPE, HeaderValue, WWW_AUTHENTICATE};
use hyper::{Method, Request, Response, StatusCode};
use serde::Deserialize;
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;

use super::webhook::Hook;
use super::{Answer, Site, busy, json};
use crate::command::{self, Context, Plan};
use crate::error::{Code, Error, Happened, Result};
use crate::execute::{self, Asker, Done, execute};
use crate::process::{Process, WRONG_PASS_REST};
use crate::resp::reply::{Protocol, Reply};

/// The description of all this, for programs; [`openapi`] adds the webhooks.
const OPENAPI: &str = include_str!("openapi.json");

/// Fields of a job that are options of the command with one value.
const FIELDS: &[(&str, &str)] = &[
    ("id", "ID"),
    ("type", "TYPE"),
    ("priority", "PRIORITY"),
    ("delay_ms", "DELAY"),
    ("at", "AT"),
    ("attempts", "ATTEMPTS"),
    ("backoff_ms", "BACKOFF"),
    ("backoff_max_ms", "BACKOFFMAX"),
    ("ttl_ms", "TTL"),
    ("group", "GROUP"),
    ("concurrency", "CONCURRENCY"),
    ("shard", "SHARD"),
];
/// Fields with a shape of their own.
const SHAPED: &[&str] = &["payload", "payload_base64", "unique", "meta", "nx"];

/// The OpenAPI document with a path for each webhook, made from its model of one.
pub fn openapi(hooks: &[Hook]) -> Bytes {
    let mut document: Value = serde_json::from_str(OPENAPI).unwrap_or_default();
    let model = document.as_object_mut().and_then(|document| document.remove("x-webhook")).unwrap_or_default();
    if let Some(paths) = document.get_mut("paths").and_then(Value::as_object_mut) {
        paths.extend(hooks.iter().map(|hook| (hook.path.clone(), hook.describe(&model))));
    }
    document.to_string().into()
}

pub async fn answer(request: Request<Incoming>, site: &Site) -> Answer {
    let process = &site.process;
    let path: Option<Vec<String>> = request.uri().path().split('/').skip(2).map(percent_decoded).collect();
    let path = path.unwrap_or_default();
    let path: Vec<&str> = path.iter().map(String::as_str).collect();
    if path == ["openapi.json"] {
        return written(StatusCode::OK, site.description.clone());
    }
    if let Err(error) = authenticate(&request, process) {
        if error.code == Code::WrongPass {
            tokio::time::sleep(WRONG_PASS_REST).await;
        }
        return refused(&error);
    }
    match (request.method().clone(), &path[..]) {
        (Method::POST, ["queues", queue, "jobs"]) => match enqueue(queue, request, process).await {
            Ok(answer) => answer,
            Err(error) => refused(&error),
        },
        (Method::GET, ["queues", queue, "jobs", id]) => {
            let reply = run(&["GOFLOW.JOB", queue, id], process).await;
            match reply {
                Reply::Null => refused(&Error::new(Code::NoSuchJob, "no job is known by this id")),
                reply => replied(reply),
            }
        }
        (Method::GET, ["queues", queue]) => replied(run(&["GOFLOW.STATS", queue], process).await),
        (Method::GET, ["queues"]) => replied(run(&["GOFLOW.QUEUES"], process).await),
        (_, ["queues", _, "jobs"]) => not_allowed("POST"),
        (_, ["queues"] | ["queues", _] | ["queues", _, "jobs", _]) => not_allowed("GET"),
        _ => failed(StatusCode::NOT_FOUND, "ERR", "there is nothing here; see /v1/openapi.json", Happened::No),
    }
}

fn authenticate(request: &Request<Incoming>, process: &Process) -> Result<()> {
    if !process.settings().auth.is_needed() {
        return Ok(());
    }
    let header = request.headers().get(AUTHORIZATION).and_then(|value| value.to_str().ok());
    let basic = header.and_then(|value| value.strip_prefix("Basic ")).and_then(|coded| json::decode(coded.trim()));
    let Some(basic) = basic else {
        return Err(Error::new(Code::NoAuth, "Authentication required: Authorization: Basic."));
    };
    let colon = basic.iter().position(|byte| *byte == b':').unwrap_or(basic.len());
    let (user, password) = (&basic[..colon], basic.get(colon + 1..).unwrap_or_default());
    process.settings().auth.check(if user.is_empty() { b"default" } else { user }, password)
}

/// Starts a command; what it submits is in its lanes when this returns.
pub(super) fn start(words: &[Bytes], process: &Arc<Process>) -> execute::Answer {
    let context = Context { protocol: Protocol::Resp3, client_id: 0, limits: process.settings().limits.clone() };
    // Requests of HTTP have no order among themselves, so they share the session that keeps none.
    let asker = Asker { session: 0, block_ms_max: process.settings().limits.block_ms_max };
    match command::find(words).and_then(|row| row.plan(words, &context)) {
        Err(error) => execute::Answer::reply(error.into()),
        Ok(Plan::Ask(ask)) => process.answer(ask),
        Ok(plan) => execute(plan, &process.dispatcher, asker),
    }
}

pub(super) async fn finish(mut answer: execute::Answer, process: &Process) -> Reply {
    let reply = match poll_fn(|context| answer.poll(context)).await {
        Done::Reply(reply) => reply,
        // Nothing here asks for deliveries; dropped, they go back.
        Done::Taken(..) | Done::Popped(..) | Done::Granted(..) | Done::Delivery(_) | Done::Deliveries(_) => Reply::Null,
    };
    if let Reply::Error(error) = &reply {
        process.metrics.error(error.code);
    }
    reply
}

async fn run(words: &[&str], process: &Arc<Process>) -> Reply {
    let words: Vec<Bytes> = words.iter().map(|word| Bytes::copy_from_slice(word.as_bytes())).collect();
    finish(start(&words, process), process).await
}

async fn enqueue(queue: &str, request: Request<Incoming>, process: &Arc<Process>) -> Result<Answer> {
    let is_json = request.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).is_some_and(|kind| {
        kind.split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json"))
    });
    let query: Vec<(String, String)> = request.uri().query().map(read_query).unwrap_or_default();
    let bytes_max = process.settings().bounds.request_bytes_max;
    let body = Limited::new(request.into_body(), bytes_max).collect().await;
    let body = body.map_err(|error| match error.is::<LengthLimitError>() {
        true => Error::new(Code::TooBig, format!("the body has more than {bytes_max} bytes")),
        false => Error::bad("the body did not arrive whole"),
    });
    let body = body?.to_bytes();
    if !is_json {
        let mut words = opening(queue, body);
        for (name, value) in query {
            let value = to_raw_value(&value).map_err(|error| Error::bad(format!("invalid {name}: {error}")))?;
            put_field(&mut words, &name, &value)?;
        }
        return Ok(placed(finish(start(&words, process), process).await));
    }
    let no_json = |error| Error::bad(format!("the body is no JSON: {error}"));
    if body.trim_ascii_start().starts_with(b"[") {
        let jobs: Vec<&RawValue> = serde_json::from_slice(&body).map_err(no_json)?;
        return enqueue_many(queue, &jobs, process).await;
    }
    let words = job_words(queue, serde_json::from_slice(&body).map_err(no_json)?)?;
    Ok(placed(finish(start(&words, process), process).await))
}

/// All are checked before one is sent; then each stands for itself.
async fn enqueue_many(queue: &str, jobs: &[&RawValue], process: &Arc<Process>) -> Result<Answer> {
    let most = process.settings().limits.batch_jobs_max;
    if jobs.len() > most {
        return Err(Error::new(Code::TooBig, format!("{} jobs, the limit is {most}", jobs.len())));
    }
    let words: Vec<Vec<Bytes>> = jobs
        .iter()
        .enumerate()
        .map(|(at, job)| {
            job_words(queue, job).map_err(|error| Error::new(error.code, format!("job {at}: {}", error.text)))
        })
        .collect::<Result<_>>()?;
    let started: Vec<execute::Answer> = words.iter().map(|words| start(words, process)).collect();
    let (mut results, mut failed) = (Vec::with_capacity(started.len()), 0);
    for answer in started {
        let reply = finish(answer, process).await;
        results.push(match &reply {
            Reply::Error(error) => {
                failed += 1;
                json!({ "error": described(error.code.word(), &error.text, error.happened) })
            }
            reply => json!({ "id": json::value(reply) }),
        });
    }
    let status = if failed == 0 { StatusCode::CREATED } else { StatusCode::MULTI_STATUS };
    Ok(written(status, json!({ "jobs": results, "failed": failed }).to_string()))
}

fn opening(queue: &str, payload: Bytes) -> Vec<Bytes> {
    vec![Bytes::from_static(b"GOFLOW.ENQUEUE"), Bytes::copy_from_slice(queue.as_bytes()), payload]
}

/// The words of the command for one job of a JSON body.
fn job_words(queue: &str, job: &RawValue) -> Result<Vec<Bytes>> {
    let fields: BTreeMap<String, &RawValue> = serde_json::from_str(job.get())
        .map_err(|_| Error::bad("expected an object with a payload, or an array of such"))?;
    let payload = match (fields.get("payload"), fields.get("payload_base64")) {
        (Some(_), Some(_)) => return Err(Error::bad("expected payload or payload_base64, not both")),
        (Some(text), None) if text.get().starts_with('"') => read::<String>("payload", text)?.into(),
        // Anything else is kept as the JSON that it is, to the letter: a number may have more digits than ours.
        (Some(value), None) => Bytes::copy_from_slice(value.get().as_bytes()),
        (None, Some(coded)) => {
            let coded: String = read("payload_base64", coded)?;
            json::decode(&coded).ok_or_else(|| Error::bad("invalid payload_base64: expected base64"))?.into()
        }
        (None, None) => return Err(Error::bad("the payload is missing: expected payload or payload_base64")),
    };
    let mut words = opening(queue, payload);
    for (name, value) in fields.iter().filter(|(name, _)| !name.starts_with("payload")) {
        put_field(&mut words, name, value)?;
    }
    if let Some(unknown) = fields.keys().find(|name| name.starts_with("payload") && !SHAPED.contains(&name.as_str())) {
        return Err(Error::bad(format!("unknown field '{unknown}'")));
    }
    Ok(words)
}

fn read<'a, T: Deserialize<'a>>(name: &str, value: &'a RawValue) -> Result<T> {
    serde_json::from_str(value.get()).map_err(|error| Error::bad(format!("invalid {name}: {error}")))
}

/// Appends the option that a field stands for.
fn put_field(words: &mut Vec<Bytes>, name: &str, value: &RawValue) -> Result<()> {
    let text = |value: &RawValue| {
        json::word(value).ok_or_else(|| Error::bad(format!("invalid {name}: expected a string or a number")))
    };
    let object = || -> Result<BTreeMap<String, &RawValue>> {
        serde_json::from_str(value.get()).map_err(|_| Error::bad(format!("invalid {name}: expected an object")))
    };
    let option = |word: &'static str| Bytes::from_static(word.as_bytes());
    match (name, value.get()) {
        ("nx", "true" | "\"true\"") => words.push(option("NX")),
        ("nx", "false") => {}
        ("nx", _) => return Err(Error::bad("invalid nx: expected true or false")),
        ("unique", _) => {
            let unique = object()?;
            let (Some(key), Some(ms), 2) = (unique.get("key"), unique.get("ms"), unique.len()) else {
                return Err(Error::bad("invalid unique: expected an object of key and ms"));
            };
            words.extend([option("UNIQUE"), text(key)?, text(ms)?]);
        }
        ("meta", _) => {
            for (field, value) in object()? {
                words.extend([option("META"), field.into(), text(value)?]);
            }
        }
        _ => match FIELDS.iter().find(|(field, _)| *field == name) {
            Some((_, word)) => words.extend([option(word), text(value)?]),
            None => return Err(Error::bad(format!("unknown field '{name}'"))),
        },
    }
    Ok(())
}

/// The pairs of a query, decoded; what cannot be decoded is left as it is.
fn read_query(query: &str) -> Vec<(String, String)> {
    let decoded = |text: &str| percent_decoded(&text.replace('+', " ")).unwrap_or_else(|| text.to_owned());
    let pairs = query.split('&').filter(|pair| !pair.is_empty());
    pairs
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .map(|(name, value)| (decoded(name), decoded(value)))
        .collect()
}

fn percent_decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        rest = tail;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let (digits, tail) = tail.split_at_checked(2)?;
        bytes.push(u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?);
        rest = tail;
    }
    String::from_utf8(bytes).ok()
}

/// The answer to one enqueue.
fn placed(reply: Reply) -> Answer {
    match &reply {
        Reply::Error(error) => refused(error),
        reply => written(StatusCode::CREATED, json!({ "id": json::value(reply) }).to_string()),
    }
}

fn replied(reply: Reply) -> Answer {
    match &reply {
        Reply::Error(error) => refused(error),
        reply => written(StatusCode::OK, json::value(reply).to_string()),
    }
}

fn described(code: &str, message: &str, happened: Happened) -> Value {
    json!({ "code": code, "message": message, "happened": if happened == Happened::No { "no" } else { "maybe" } })
}

pub(super) fn refused(error: &Error) -> Answer {
    let status = match error.code {
        Code::NoAuth | Code::WrongPass => StatusCode::UNAUTHORIZED,
        Code::NoPerm => StatusCode::FORBIDDEN,
        Code::NoSuchJob => StatusCode::NOT_FOUND,
        Code::Duplicate | Code::LeaseLost => StatusCode::CONFLICT,
        Code::TooBig => StatusCode::PAYLOAD_TOO_LARGE,
        Code::QueueFull => StatusCode::TOO_MANY_REQUESTS,
        Code::ShardDown | Code::Overloaded => StatusCode::SERVICE_UNAVAILABLE,
        _ => StatusCode::BAD_REQUEST,
    };
    let mut answer = failed(status, error.code.word(), &error.text, error.happened);
    if status == StatusCode::UNAUTHORIZED {
        answer.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Basic realm=\"goflow\""));
    }
    match status {
        StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => busy(answer),
        _ => answer,
    }
}

pub(super) fn failed(status: StatusCode, code: &str, message: &str, happened: Happened) -> Answer {
    written(status, json!({ "error": described(code, message, happened) }).to_string())
}

fn not_allowed(method: &'static str) -> Answer {
    let mut answer = failed(StatusCode::METHOD_NOT_ALLOWED, "ERR", "another method is expected here", Happened::No);
    answer.headers_mut().insert(ALLOW, HeaderValue::from_static(method));
    answer
}

pub(super) fn written(status: StatusCode, body: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Full::from(body.into()));
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(job: impl ToString) -> Result<Vec<String>> {
        let words = job_words("main", serde_json::from_str(&job.to_string()).unwrap())?;
        Ok(words.iter().map(|word| String::from_utf8_lossy(word).into_owned()).collect())
    }

    #[test]
    fn a_job_becomes_the_words_of_an_enqueue() {
        let job = json!({"payload": "p", "id": "a", "priority": -5, "meta": {"k": "v"}, "nx": true, "unique": {"key": "u", "ms": 9}});
        let words = words(job).unwrap();
        assert_eq!(words[..3], ["GOFLOW.ENQUEUE", "main", "p"]);
        for expected in [&["ID", "a"][..], &["PRIORITY", "-5"], &["META", "k", "v"], &["NX"], &["UNIQUE", "u", "9"]] {
            assert!(words.windows(expected.len()).any(|part| part == expected), "{expected:?} in {words:?}");
        }
    }

    #[test]
    fn numbers_are_taken_to_the_letter() {
        let job = r#"{"payload": "", "id": 123456789012345678901, "type": 1.10, "meta": {"a": 1e400, "b": "\u0031"},
            "unique": {"key": 123456789012345678902, "ms": 9}}"#;
        let words = words(job).unwrap();
        for expected in [
            &["ID", "123456789012345678901"][..],
            &["TYPE", "1.10"],
            &["META", "a", "1e400", "META", "b", "1"],
            &["UNIQUE", "123456789012345678902", "9"],
        ] {
            assert!(words.windows(expected.len()).any(|part| part == expected), "{expected:?} in {words:?}");
        }
    }

    #[test]
    fn payloads_are_text_or_json_or_base64() {
        for (job, payload) in [
            (r#"{"payload": "text"}"#, "text"),
            (r#"{"payload": "\u00e4 \"\n"}"#, "\u{e4} \"\n"),
            (r#"{"payload_base64": "aGk="}"#, "hi"),
            (r#"{"payload": null}"#, "null"),
        ] {
            assert_eq!(words(job).unwrap()[2], payload);
        }
        // Order, blanks, escapes, names that are there twice and numbers of any length.
        for text in [
            r#"{ "z": 1, "a": [1.0,  null], "a": "\u0041\/" }"#,
            "12345678901234567890.10",
            "1E400",
            "-0",
            &format!("{}{}", "[".repeat(200), "]".repeat(200)),
        ] {
            assert_eq!(words(format!("{{\"payload\": {text} , \"id\": \"a\"}}")).unwrap()[2], text);
        }
    }

    #[test]
    fn what_is_no_job_is_refused_with_the_field_named() {
        for (job, named) in [
            (json!("x"), "object"),
            (json!({}), "payload"),
            (json!({"payload": "", "payload_base64": ""}), "not both"),
            (json!({"payload_base64": "%"}), "payload_base64"),
            (json!({"payload_base64": 7}), "payload_base64"),
            (json!({"payload": "", "colour": 1}), "colour"),
            (json!({"payload": "", "payload_utf16": 1}), "payload_utf16"),
            (json!({"payload": "", "unique": {"key": "a"}}), "unique"),
            (json!({"payload": "", "meta": []}), "meta"),
            (json!({"payload": "", "id": [1]}), "id"),
            (json!({"payload": "", "nx": "no"}), "nx"),
        ] {
            let error = words(job.clone()).expect_err(&job.to_string());
            assert!(error.text.contains(named), "{job}: {}", error.text);
        }
        let half_a_pair = words(r#"{"payload": "\ud800"}"#).unwrap_err();
        assert!(half_a_pair.text.contains("invalid payload: "), "{}", half_a_pair.text);
    }

    #[test]
    fn every_option_of_the_command_is_a_field() {
        let words: Vec<Bytes> = [&b"GOFLOW.ENQUEUE"[..], b"main", b"x"].map(Bytes::from_static).to_vec();
        let row = command::find(&words).unwrap();
        for token in row.args.iter().filter_map(|arg| arg.token) {
            let is_field = FIELDS.iter().any(|(_, word)| *word == token);
            let is_shaped = SHAPED.contains(&token.to_ascii_lowercase().as_str());
            assert!(is_field || is_shaped, "a job over HTTP cannot say {token}");
        }
    }

    #[test]
    fn every_field_and_path_is_in_the_description() {
        let description: Value = serde_json::from_str(OPENAPI).unwrap();
        let described = description["components"]["schemas"]["Job"]["properties"].as_object().unwrap();
        let fields: Vec<&str> = FIELDS.iter().map(|(field, _)| *field).chain(SHAPED.iter().copied()).collect();
        assert!(fields.iter().all(|field| described.contains_key(*field)) && described.len() == fields.len());
        let paths: Vec<&String> = description["paths"].as_object().unwrap().keys().collect();
        let expected = ["/v1/queues", "/v1/queues/{queue}", "/v1/queues/{queue}/jobs", "/v1/queues/{queue}/jobs/{id}"];
        assert_eq!(paths, expected);
    }

    #[test]
    fn queries_and_paths_are_decoded() {
        assert_eq!(read_query("a=b%20c+d&x"), [("a".into(), "b c d".into()), ("x".into(), String::new())]);
        assert_eq!(percent_decoded("a%2Fb").as_deref(), Some("a/b"));
        assert!(percent_decoded("%").is_none() && percent_decoded("%zz").is_none() && percent_decoded("%ff").is_none());
    }
}
