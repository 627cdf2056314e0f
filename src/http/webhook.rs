//! Webhooks: what other services post becomes a job once its signature holds.
//!
//! A [`Hook`] is one configured path. A delivery's signature is looked for first, then its body is read up to the hook's bound,
//! the signature compared with that of each secret, the age looked at, and only then is anything of the body believed. It
//! goes on as `GOFLOW.ENQUEUE` with the body as it came; the delivery's id is the job's `ID`, so that one that is sent again
//! adds nothing and gets the same answer.
//!
//! All schemes are HMAC-SHA256 and differ in where the signature and the time stand ([`Layout`]) and in what is signed
//! ([`Part`]). Secrets are in the keys alone and cannot be shown. The age is by this process's clock: nothing is stored by it.

use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper::header::{ALLOW, HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, Request, StatusCode};
use ring::hmac;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;

use super::api::{failed, finish, refused, start, written};
use super::{Answer, json};
use crate::clock::{self, Millis, UnixMs};
use crate::error::{Code, Happened};
use crate::job::Name;
use crate::process::{Process, same};
use crate::resp::reply::Reply;

/// Signatures of one delivery that are looked at; a service sends two while it changes its secret.
const SIGNATURES_MAX: usize = 8;

/// One path and the queue that its deliveries go to.
#[derive(Debug)]
pub struct Hook {
    pub path: String,
    pub queue: Name,
    pub scheme: Scheme,
    /// Each is good, so that a secret can be changed without a gap.
    pub keys: Vec<hmac::Key>,
    /// How far the delivery's time may be from ours, either way; for schemes that sign one.
    pub tolerance_ms: Millis,
    pub body_bytes_max: usize,
    /// Where the delivery's id stands, which becomes the job's.
    pub id: Option<Place>,
    /// Where its kind stands, which becomes the job's type.
    pub kind: Option<Place>,
    /// Headers that become metadata of the job.
    pub headers: Vec<HeaderName>,
}

/// A key from a secret as it is written.
pub fn key(secret: &str) -> hmac::Key {
    hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes())
}

/// Where a delivery says something about itself.
#[derive(Clone, Debug, PartialEq)]
pub enum Place {
    Header(HeaderName),
    /// A field at the top of a JSON body.
    Field(String),
}

/// How a service signs.
#[derive(Clone, Debug, PartialEq)]
pub struct Scheme {
    pub header: HeaderName,
    pub layout: Layout,
    /// What is signed, in this order.
    pub signed: Vec<Part>,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Layout {
    /// `t=SECONDS,v1=HEX[,v1=HEX]` in one header.
    Stripe,
    /// The signature behind a prefix, more of them with blanks between; the time in a header of its own, if anywhere.
    Plain { prefix: String, encoding: Encoding, timestamp: Option<HeaderName> },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    Hex,
    Base64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    Text(String),
    Timestamp,
    /// Only where the id stands in a header.
    Id,
    Body,
}

/// What became of a delivery, as the metric names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Accepted,
    /// Signed by nobody we know.
    Unsigned,
    /// Signed, but outside the tolerance.
    Late,
    /// No POST, too large, without its id, or no job for another reason.
    Malformed,
    /// It could not be stored now, and should be sent again.
    Unavailable,
}

impl Fate {
    fn word(self) -> &'static str {
        match self {
            Fate::Accepted => "accepted",
            Fate::Unsigned => "unsigned",
            Fate::Late => "late",
            Fate::Malformed => "malformed",
            Fate::Unavailable => "unavailable",
        }
    }
}

/// Why a delivery becomes no job.
#[derive(Debug)]
struct Refusal {
    fate: Fate,
    status: StatusCode,
    code: Code,
    why: String,
}

impl Refusal {
    fn unsigned(why: impl Into<String>) -> Refusal {
        Refusal { fate: Fate::Unsigned, status: StatusCode::UNAUTHORIZED, code: Code::NoAuth, why: why.into() }
    }

    fn late(why: impl Into<String>) -> Refusal {
        Refusal { fate: Fate::Late, status: StatusCode::UNAUTHORIZED, code: Code::NoAuth, why: why.into() }
    }

    fn malformed(status: StatusCode, code: Code, why: impl Into<String>) -> Refusal {
        Refusal { fate: Fate::Malformed, status, code, why: why.into() }
    }
}

/// Answers one delivery to the hook's path.
pub async fn answer(hook: &Hook, request: Request<Incoming>, process: &Arc<Process>) -> Answer {
    let (answer, fate) = match take(hook, request).await {
        Err(refusal) => {
            tracing::debug!(path = hook.path, result = refusal.fate.word(), why = refusal.why, "webhook refused");
            let mut answer = failed(refusal.status, refusal.code.word(), &refusal.why, Happened::No);
            if refusal.status == StatusCode::METHOD_NOT_ALLOWED {
                answer.headers_mut().insert(ALLOW, HeaderValue::from_static("POST"));
            }
            (answer, refusal.fate)
        }
        Ok(words) => match finish(start(&words, process), process).await {
            Reply::Error(error) => {
                let again = matches!(error.code, Code::ShardDown | Code::Overloaded | Code::QueueFull);
                (refused(&error), if again { Fate::Unavailable } else { Fate::Malformed })
            }
            reply => (written(StatusCode::OK, json!({ "id": json::value(&reply) }).to_string()), Fate::Accepted),
        },
    };
    process.metrics.webhook(&hook.path, fate.word());
    answer
}

/// The words of the command that a delivery stands for, once it is believed.
async fn take(hook: &Hook, request: Request<Incoming>) -> Result<Vec<Bytes>, Refusal> {
    if request.method() != Method::POST {
        return Err(Refusal::malformed(StatusCode::METHOD_NOT_ALLOWED, Code::Err, "expected POST"));
    }
    let (head, body) = request.into_parts();
    let claim = hook.scheme.read(&head.headers)?;
    let body =
        Limited::new(body, hook.body_bytes_max).collect().await.map_err(|error| match error
            .is::<http_body_util::LengthLimitError>(
        ) {
            true => Refusal::malformed(
                StatusCode::PAYLOAD_TOO_LARGE,
                Code::TooBig,
                format!("the body has more than {} bytes", hook.body_bytes_max),
            ),
            false => Refusal::malformed(StatusCode::BAD_REQUEST, Code::Err, "the body did not arrive whole"),
        })?;
    hook.words(&head.headers, &claim, body.to_bytes(), clock::now())
}

/// What the headers say of a signature, believed by nobody yet.
#[derive(Debug, PartialEq)]
struct Claim {
    signatures: Vec<Vec<u8>>,
    /// As it is signed.
    timestamp: Option<String>,
}

impl Scheme {
    fn read(&self, headers: &HeaderMap) -> Result<Claim, Refusal> {
        let text = |name: &HeaderName| {
            let value = headers.get(name).and_then(|value| value.to_str().ok()).map(str::trim);
            value.ok_or_else(|| Refusal::unsigned(format!("the header {name} is missing")))
        };
        let value = text(&self.header)?;
        let claim = match &self.layout {
            Layout::Stripe => {
                let fields = || value.split(',').filter_map(|field| field.trim().split_once('='));
                let timestamp = fields().find(|(name, _)| *name == "t").map(|(_, value)| value.to_owned());
                let timestamp = timestamp.ok_or_else(|| Refusal::unsigned(format!("{} has no t=", self.header)))?;
                let signatures = fields().filter(|(name, _)| *name == "v1").filter_map(|(_, hex)| decode_hex(hex));
                Claim { signatures: signatures.take(SIGNATURES_MAX).collect(), timestamp: Some(timestamp) }
            }
            Layout::Plain { prefix, encoding, timestamp } => {
                let timestamp = timestamp.as_ref().map(|name| text(name).map(str::to_owned)).transpose()?;
                let signatures = value.split_ascii_whitespace().filter_map(|one| one.strip_prefix(prefix.as_str()));
                let signatures = signatures.filter_map(|one| match encoding {
                    Encoding::Hex => decode_hex(one),
                    Encoding::Base64 => json::decode(one),
                });
                Claim { signatures: signatures.take(SIGNATURES_MAX).collect(), timestamp }
            }
        };
        match claim.signatures.is_empty() {
            true => Err(Refusal::unsigned(format!("{} holds no signature of the expected form", self.header))),
            false => Ok(claim),
        }
    }
}

impl Hook {
    fn words(&self, headers: &HeaderMap, claim: &Claim, body: Bytes, now: UnixMs) -> Result<Vec<Bytes>, Refusal> {
        self.verify(headers, claim, &body, now)?;
        // From here on the delivery is the service's.
        let needs_json = [&self.id, &self.kind].into_iter().flatten().any(|place| matches!(place, Place::Field(_)));
        // Without the error's own words, which may repeat what stands there.
        let no_json = |error: serde_json::Error| {
            let why = format!("the body is no JSON: line {} column {}", error.line(), error.column());
            Refusal::malformed(StatusCode::BAD_REQUEST, Code::Err, why)
        };
        let document: Option<&RawValue> =
            needs_json.then(|| serde_json::from_slice(&body)).transpose().map_err(no_json)?;
        // Anything but an object has no fields.
        let fields: BTreeMap<String, &RawValue> =
            document.and_then(|document| serde_json::from_str(document.get()).ok()).unwrap_or_default();
        let mut words =
            vec![Bytes::from_static(b"GOFLOW.ENQUEUE"), self.queue.as_str().to_owned().into(), body.clone()];
        if let Some(place) = &self.id {
            let id = place.find(headers, &fields).ok_or_else(|| {
                let why = format!("the delivery has no id: expected {place}");
                Refusal::malformed(StatusCode::BAD_REQUEST, Code::Err, why)
            })?;
            words.extend([Bytes::from_static(b"ID"), id]);
        }
        if let Some(kind) = self.kind.as_ref().and_then(|place| place.find(headers, &fields)) {
            words.extend([Bytes::from_static(b"TYPE"), kind]);
        }
        for name in &self.headers {
            if let Some(value) = headers.get(name) {
                let (field, value) = (name.as_str().to_owned().into(), Bytes::copy_from_slice(value.as_bytes()));
                words.extend([Bytes::from_static(b"META"), field, value]);
            }
        }
        Ok(words)
    }

    fn verify(&self, headers: &HeaderMap, claim: &Claim, body: &[u8], now: UnixMs) -> Result<(), Refusal> {
        let sign = |key: &hmac::Key| {
            let mut context = hmac::Context::with_key(key);
            for part in &self.scheme.signed {
                match (part, &self.id) {
                    (Part::Text(text), _) => context.update(text.as_bytes()),
                    (Part::Timestamp, _) => context.update(claim.timestamp.as_deref().unwrap_or_default().as_bytes()),
                    (Part::Id, Some(Place::Header(name))) => {
                        context.update(headers.get(name).map_or(b"".as_slice(), HeaderValue::as_bytes));
                    }
                    (Part::Id, _) => {}
                    (Part::Body, _) => context.update(body),
                }
            }
            context.sign()
        };
        // Every signature is compared with every secret's in full: the time taken says nothing about which was nearly right.
        let holds = self.keys.iter().map(sign).fold(false, |holds, expected| {
            claim.signatures.iter().fold(holds, |holds, given| holds | same(given, expected.as_ref()))
        });
        if !holds {
            return Err(Refusal::unsigned("the signature does not hold"));
        }
        let Some(timestamp) = &claim.timestamp else { return Ok(()) };
        let seconds: Option<u64> = timestamp.parse().ok();
        match seconds.and_then(|seconds| seconds.checked_mul(1_000)) {
            None => Err(Refusal::late("its time is no whole number of seconds")),
            Some(at) if at.abs_diff(now) > self.tolerance_ms => {
                Err(Refusal::late(format!("its time is more than {} ms from ours", self.tolerance_ms)))
            }
            Some(_) => Ok(()),
        }
    }

    /// The path in the OpenAPI document, made from its model of a webhook.
    pub fn describe(&self, model: &Value) -> Value {
        let mut item = model.clone();
        let header = |name: &HeaderName| json!({ "name": name.as_str(), "in": "header", "required": true, "schema": { "type": "string" } });
        let mut names = vec![&self.scheme.header];
        if let Layout::Plain { timestamp: Some(name), .. } = &self.scheme.layout {
            names.push(name);
        }
        if let Some(Place::Header(name)) = &self.id {
            names.push(name);
        }
        item["post"]["parameters"] = names.into_iter().map(header).collect();
        item["post"]["summary"] = format!("A delivery for the queue {}", self.queue.as_str()).into();
        item
    }
}

impl Place {
    fn find(&self, headers: &HeaderMap, fields: &BTreeMap<String, &RawValue>) -> Option<Bytes> {
        let found = match self {
            Place::Header(name) => Bytes::copy_from_slice(headers.get(name)?.as_bytes()),
            Place::Field(name) => json::word(fields.get(name)?)?,
        };
        (!found.is_empty()).then_some(found)
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Place::Header(name) => write!(f, "the header {name}"),
            Place::Field(name) => write!(f, "the field {name} of a JSON body"),
        }
    }
}

fn decode_hex(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: &u8| char::from(*byte).to_digit(16).map(|digit| digit as u8);
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    let bytes: Option<Vec<u8>> = pairs.iter().map(|[high, low]| Some(digit(high)? << 4 | digit(low)?)).collect();
    bytes.filter(|bytes| rest.is_empty() && !bytes.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixMs = 1_700_000_000_000;

    fn header(name: &'static str) -> HeaderName {
        HeaderName::from_static(name)
    }

    fn hook(scheme: Scheme, secrets: &[&str]) -> Hook {
        Hook {
            path: "/hooks/x".into(),
            queue: Name::parse(b"main").unwrap(),
            scheme,
            keys: secrets.iter().map(|secret| key(secret)).collect(),
            tolerance_ms: 300_000,
            body_bytes_max: 1_000,
            id: None,
            kind: None,
            headers: Vec::new(),
        }
    }

    fn github() -> Scheme {
        let layout = Layout::Plain { prefix: "sha256=".into(), encoding: Encoding::Hex, timestamp: None };
        Scheme { header: header("x-hub-signature-256"), layout, signed: vec![Part::Body] }
    }

    fn stripe() -> Scheme {
        let signed = vec![Part::Timestamp, Part::Text(".".into()), Part::Body];
        Scheme { header: header("stripe-signature"), layout: Layout::Stripe, signed }
    }

    fn take(hook: &Hook, headers: &[(&'static str, &str)], body: &'static str) -> Result<Vec<String>, Fate> {
        let headers: HeaderMap =
            headers.iter().map(|(name, value)| (header(name), HeaderValue::from_str(value).unwrap())).collect();
        let claim = hook.scheme.read(&headers).map_err(|refusal| refusal.fate)?;
        let words = hook.words(&headers, &claim, Bytes::from_static(body.as_bytes()), NOW);
        let words = words.map_err(|refusal| refusal.fate)?;
        Ok(words.iter().map(|word| String::from_utf8_lossy(word).into_owned()).collect())
    }

    fn hex(secret: &str, message: &str) -> String {
        let tag = hmac::sign(&key(secret), message.as_bytes());
        tag.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn the_example_in_githubs_manual_holds_and_each_change_of_it_does_not() {
        let hook = hook(github(), &["It's a Secret to Everybody"]);
        let hex = "757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17";
        let signed = format!("sha256={hex}");
        let words = take(&hook, &[("x-hub-signature-256", &signed)], "Hello, World!").unwrap();
        assert_eq!(words, ["GOFLOW.ENQUEUE", "main", "Hello, World!"]);
        assert_eq!(take(&hook, &[("x-hub-signature-256", &signed)], "Hello, World?"), Err(Fate::Unsigned));
        for wrong in ["", "sha256=", "sha1=757107", &hex[1..], &signed[..70], &signed[..69], &format!("{signed}00")] {
            assert_eq!(take(&hook, &[("x-hub-signature-256", wrong)], "Hello, World!"), Err(Fate::Unsigned), "{wrong}");
        }
        assert_eq!(take(&hook, &[], "Hello, World!"), Err(Fate::Unsigned));
    }

    #[test]
    fn a_signed_time_is_believed_within_the_tolerance_and_either_secret_signs() {
        let hook = hook(stripe(), &["old", "new"]);
        for (offset_s, expected) in
            [(0, None), (-300, None), (300, None), (-301, Some(Fate::Late)), (301, Some(Fate::Late))]
        {
            let at = NOW as i64 / 1_000 + offset_s;
            for secret in ["old", "new"] {
                let signature = hex(secret, &format!("{at}.body"));
                let value = format!("t={at},v1={},v1={signature},v0=xx", hex("other", "x"));
                let taken = take(&hook, &[("stripe-signature", &value)], "body");
                assert_eq!(taken.err(), expected, "{offset_s} with {secret}");
            }
        }
        let signature = hex("old", "1700000000.body");
        // Another time than the signed one.
        let moved = format!("t=1700000001,v1={signature}");
        assert_eq!(take(&hook, &[("stripe-signature", &moved)], "body"), Err(Fate::Unsigned));
        for time in ["", "x", "-1", "18446744073709551615", "99999999999999999999"] {
            let value = format!("t={time},v1={}", hex("old", &format!("{time}.body")));
            assert_eq!(take(&hook, &[("stripe-signature", &value)], "body"), Err(Fate::Late), "{time}");
        }
        assert_eq!(take(&hook, &[("stripe-signature", &format!("v1={signature}"))], "body"), Err(Fate::Unsigned));
    }

    #[test]
    fn id_kind_and_headers_become_options_of_the_job() {
        let layout =
            Layout::Plain { prefix: String::new(), encoding: Encoding::Base64, timestamp: Some(header("x-at")) };
        let signed = vec![Part::Id, Part::Text(".".into()), Part::Timestamp, Part::Text(".".into()), Part::Body];
        let mut hook = hook(Scheme { header: header("x-signature"), layout, signed }, &["s"]);
        hook.id = Some(Place::Header(header("x-id")));
        hook.kind = Some(Place::Field("kind".into()));
        hook.headers = vec![header("x-tenant"), header("x-absent")];
        let body = r#"{"kind":"paid"}"#;
        // From Python: base64.b64encode(hmac.digest(b's', b'e-7.1700000000.{"kind":"paid"}', 'sha256'))
        let signature = "t9VUzCNr3pIZTXzbakVTvOJfTuPpKYr8Pf73B5k86X8=";
        let with = |id| [("x-signature", signature), ("x-at", "1700000000"), ("x-id", id), ("x-tenant", "acme")];
        let words = take(&hook, &with("e-7"), body).unwrap();
        assert_eq!(words[2..], [body, "ID", "e-7", "TYPE", "paid", "META", "x-tenant", "acme"]);
        assert_eq!(take(&hook, &with("e-8"), body), Err(Fate::Unsigned), "the id is signed here");
        hook.id = Some(Place::Field("id".into()));
        hook.scheme.signed = vec![Part::Body];
        let hex = hmac::sign(&key("s"), body.as_bytes());
        let signature = json::encode(hex.as_ref());
        let taken = take(&hook, &[("x-signature", &signature), ("x-at", "1700000000")], body);
        assert_eq!(taken, Err(Fate::Malformed), "without its id a delivery could be added twice");
    }

    #[test]
    fn a_number_is_taken_to_the_letter_and_none_is_too_great_for_the_rest_of_a_body() {
        let mut hook = hook(github(), &["s"]);
        hook.id = Some(Place::Field("id".into()));
        let words = |body: &'static str| {
            let signature = format!("sha256={}", hex("s", body));
            take(&hook, &[("x-hub-signature-256", &signature)], body)
        };
        for (body, id) in [
            (r#"{"id":123456789012345678901}"#, "123456789012345678901"),
            (r#"{"id":123456789012345678902}"#, "123456789012345678902"),
            (r#"{ "id" : 1.10 , "more": [1e400]}"#, "1.10"),
            (r#"{"id":"\u00e4"}"#, "\u{e4}"),
        ] {
            assert_eq!(words(body).unwrap()[3..], ["ID", id]);
        }
        for body in [r#"{"id":[7]}"#, r#"{"id":null}"#, r#"{"id":""}"#, r#"{"id":"\ud800"}"#, r#"["id"]"#, "7", "{"] {
            assert_eq!(words(body), Err(Fate::Malformed), "{body}");
        }
        let body = "\"canary";
        let claim = Claim { signatures: vec![decode_hex(&hex("s", body)).unwrap()], timestamp: None };
        let refused = hook.words(&HeaderMap::new(), &claim, body.into(), NOW).unwrap_err();
        assert_eq!(refused.why, "the body is no JSON: line 1 column 7", "it repeats nothing of the body");
        // Where a field is only the kind's, a body without fields has none.
        (hook.kind, hook.id) = (Some(Place::Field("kind".into())), None);
        let signature = format!("sha256={}", hex("s", "[1]"));
        assert_eq!(take(&hook, &[("x-hub-signature-256", &signature)], "[1]").unwrap()[3..], [""; 0]);
    }

    #[test]
    fn a_key_shows_no_secret() {
        assert!(!format!("{:?}", hook(github(), &["hush-hush"])).contains("hush-hush"));
    }
}
