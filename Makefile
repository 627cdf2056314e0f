# run    the queue, with an embedded shard in ./goflow-data, on 127.0.0.1:6380
# test   everything that must hold before a change is done; says first what is missing (.ci/setup installs it)
# lint   formatting and lints alone
# soak   the model test and the recovery tests, long
# bench  the load generator against a server of its own

CARGO ?= cargo
TARGET = $(or $(CARGO_TARGET_DIR),target)

.PHONY: run test lint soak bench tools

run:
	$(CARGO) run --release -- serve

test: tools lint
	$(CARGO) test --all-targets --quiet

lint:
	$(CARGO) fmt --check
	$(CARGO) clippy --all-targets --quiet -- -D warnings

soak:
	GOFLOW_MODEL_STEPS=200000 $(CARGO) test --release --test main model:: recovery:: -- --nocapture

bench:
	$(CARGO) run --release -- bench

tools:
	@for tool in redis-server redis-cli setpriv node gcc promtool haproxy systemd-analyze; do \
	  command -v $$tool >/dev/null || echo "missing: $$tool (run .ci/setup)"; done
	@[ -x $(TARGET)/venv/bin/python ] || echo "missing: the test venv with Redis 6.2 and Valkey 9 (run .ci/setup)"
	@[ -d $(TARGET)/clients/node_modules ] || echo "missing: the Node clients (run .ci/setup)"
