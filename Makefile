# run    the queue, with an embedded shard in ./goflow-data, on 127.0.0.1:6380
# test   everything that must hold before a change is done; says first what is missing (.ci/setup installs it)
# lint   formatting and lints alone
# soak   the model test, the recovery, loss, fleet and group tests, long; placement, waiting, flat cost and ordinary commands at full size
# bench  the load generator against a server of its own
# speed  what a job costs in every shape, beside beanstalkd where that is installed: medians of five
# forward  CPU time for each forwarded request beside nutcracker (apt-get install nutcracker)

CARGO ?= cargo
TARGET = $(or $(CARGO_TARGET_DIR),target)

.PHONY: run test lint soak bench speed forward tools

run:
	$(CARGO) run --release -- serve

test: tools lint
	$(CARGO) test --all-targets --quiet

lint:
	$(CARGO) fmt --check
	$(CARGO) clippy --all-targets --quiet -- -D warnings

# The sizes may be given: make soak JOBS=1000000 KILLS=200
# Every test run is the same one; a soak has another seed each time, and prints it.
SEED := $(shell date +%s)
JOBS = 200000
KILLS = 40
STORM = 10000

soak:
	GOFLOW_PATIENCE_S=3600 GOFLOW_MODEL_STEPS=$(JOBS) GOFLOW_MODEL_SEED=$(SEED) GOFLOW_LOSS_JOBS=$(JOBS) GOFLOW_LOSS_KILLS=$(KILLS) \
	  GOFLOW_FLEET_JOBS=$(JOBS) GOFLOW_FLEET_RATE=2000 \
	  GOFLOW_GROUPS=10000 GOFLOW_GROUP_JOBS=$(JOBS) GOFLOW_GROUP_WORKERS=100 GOFLOW_GROUP_KILLS=$(KILLS) \
	  $(CARGO) test --release --test main -- --nocapture --test-threads 1 model:: recovery:: loss:: fleet:: groups::
	GOFLOW_PATIENCE_S=3600 GOFLOW_LIMIT_S=60 GOFLOW_LIMIT_BOUNDS=1 GOFLOW_LIMIT_JOBS=20000 \
	  $(CARGO) test --release --test main -- --nocapture --test-threads 1 limits::
	GOFLOW_PATIENCE_S=3600 GOFLOW_PLACEMENT_JOBS=1000000 GOFLOW_PLACEMENT_IDS=1000000 \
	  GOFLOW_WAITING_WORKERS=1000 GOFLOW_WAITING_JOBS=10000 GOFLOW_WAITING_IDLE_S=20 GOFLOW_WAITING_BOUNDS=1 \
	  GOFLOW_FLAT_DEPTH=1000000 GOFLOW_FLAT_BOUNDS=1 GOFLOW_SERIES_QUEUES=10000 \
	  $(CARGO) test --release --test main -- --nocapture --test-threads 1 routing:: waiting:: flat:: http::
	GOFLOW_PATIENCE_S=3600 GOFLOW_DURABLE_KILLS=50 GOFLOW_LIBRARY_JOBS=2000 GOFLOW_FORWARD_CLIENTS=5000 \
	  GOFLOW_FORWARD_BOUNDS=1 GOFLOW_FORWARD_SEQUENCES=5000 \
	  $(CARGO) test --release --test main -- --nocapture --test-threads 1 durable:: libraries:: forward::
	GOFLOW_PATIENCE_S=3600 GOFLOW_STORM_DEATHS=$(STORM) GOFLOW_STORM_MS=5000 \
	  $(CARGO) test --release --test main -- --nocapture --test-threads 1 alerts::
	GOFLOW_PATIENCE_S=3600 GOFLOW_SESSION_HELD_MS=600000 GOFLOW_SESSION_LEASES=100000 GOFLOW_SESSION_WORKERS=1000 \
	  GOFLOW_SESSION_WATCH_MS=60000 GOFLOW_CONTEST_CLIENTS=64 GOFLOW_CONTEST_GRANTS=400 GOFLOW_CONTEST_FAULTS=$(KILLS) \
	  GOFLOW_LOCK_ROUNDS=4000 GOFLOW_LOCK_BOUNDS=1 \
	  $(CARGO) test --release --test main -- --nocapture --test-threads 1 workers:: contest::

bench:
	$(CARGO) run --release -- bench

speed:
	$(CARGO) build --release
	benches/speed.py $(TARGET)/release/goflow

forward:
	$(CARGO) build --release
	benches/forward.py $(TARGET)/release/goflow

tools:
	@for tool in redis-server redis-cli setpriv node gcc promtool haproxy systemd-analyze sidekiq; do \
	  command -v $$tool >/dev/null || echo "missing: $$tool (run .ci/setup)"; done
	@[ -x $(TARGET)/venv/bin/python ] || echo "missing: the test venv with Redis 6.2 and Valkey 9 (run .ci/setup)"
	@[ -x $(TARGET)/venv/bin/celery ] && [ -x $(TARGET)/venv/bin/rq ] && [ -x $(TARGET)/venv-arq/bin/arq ] \
	  || echo "missing: the queue libraries for Python (run .ci/setup)"
	@[ -d $(TARGET)/clients/node_modules/bullmq ] || echo "missing: the Node clients (run .ci/setup)"
