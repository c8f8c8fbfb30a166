# `make demo` needs Python 3.11 to 3.13 and make, nothing else. What is downloaded or built is kept outside the
# checkout ($WHISPERLET_CACHE, else ~/.cache/whisperlet, and pip's own cache), so a fresh clone is soon ready.

PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null \
	&& echo $$python && break; done)
RECIPE ?= base_wi8

BIN := .venv/bin
STAMP := .venv/.installed
PIP_INSTALL := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 \
	$(BIN)/python -m pip install -qq --no-input --no-compile
BUNDLE := build/$(RECIPE).tflite
BYSTANDERS := __init__ __main__ artefacts charts comparison distil divergence entities evaluation evaluation_tables heatmap inspection intervals metrics onnx2tf onnx_export report results tables trials worst# modules that a build does not use
BUNDLE_SOURCES := $(sort $(filter-out $(BYSTANDERS:%=convert/%.py),$(wildcard convert/*.py)) \
	$(wildcard convert/adapters/* convert/golden/* whisperlet/*.py) convert/recipes/$(RECIPE).toml) constraints.txt
CACHE := $(or $(WHISPERLET_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/whisperlet)/bundles
SYSTEM_PACKAGES := chromium libasound2-plugins mosquitto portaudio19-dev pulseaudio systemd udev

# What a distribution's package would hold besides the program itself: file here, file on the device.
BOARD ?= generic-x86
BOARD_FILES := firmware_config/$(BOARD)
DEVICE_FILES := \
	systemd/whisperlet-agent.service:usr/lib/systemd/system/whisperlet-agent.service \
	systemd/whisperlet.sysusers.conf:usr/lib/sysusers.d/whisperlet.conf \
	systemd/whisperlet.tmpfiles.conf:usr/lib/tmpfiles.d/whisperlet.conf \
	firmware_config/journald.conf:usr/lib/systemd/journald.conf.d/50-whisperlet.conf \
	firmware_config/agent.toml:usr/share/doc/whisperlet/agent.toml \
	docs/device.md:usr/share/doc/whisperlet/device.md \
	docs/operations.md:usr/share/doc/whisperlet/operations.md \
	docs/outbox.md:usr/share/doc/whisperlet/outbox.md \
	docs/telemetry.md:usr/share/doc/whisperlet/telemetry.md \
	docs/terms.md:usr/share/doc/whisperlet/terms.md \
	docs/threat-model.md:usr/share/doc/whisperlet/threat-model.md \
	$(BOARD_FILES)/agent.toml:usr/share/whisperlet/agent.toml \
	$(BOARD_FILES)/asound.conf:etc/alsa/conf.d/60-whisperlet.conf \
	$(BOARD_FILES)/config.txt:usr/share/whisperlet/config.txt \
	$(BOARD_FILES)/microphone.rules:usr/lib/udev/rules.d/85-whisperlet-microphone.rules \
	$(BOARD_FILES)/pipewire.conf:usr/share/pipewire/pipewire.conf.d/60-whisperlet.conf \
	$(BOARD_FILES)/service.conf:usr/lib/systemd/system/whisperlet-agent.service.d/50-board.conf \
	$(BOARD_FILES)/tmpfiles.conf:usr/lib/tmpfiles.d/whisperlet-board.conf \
	$(BUNDLE):usr/share/whisperlet/$(RECIPE).tflite

.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help venv mic system bundle demo test lint bench fuzz soak schemas install-device uninstall-device clean

help:
	@echo 'make demo     set everything up and watch the agent work, over MQTT, on recorded speech'
	@echo 'make bundle   build/$(RECIPE).tflite; RECIPE=NAME for another of convert/recipes/'
	@echo 'make test     lint, then all tests'
	@echo 'make bench    measure everything, which takes hours on a quiet machine; BENCH=latency for one'
	@echo 'make soak     faults by the hundred, which takes minutes; SOAK=outbox for one'
	@echo 'make fuzz     feed everything that reads foreign bytes with nonsense; MINUTES=10, FUZZ=NAME for one target'
	@echo 'make venv     .venv with everything installed; PYTHON=... to choose the interpreter'
	@echo 'make lint     ruff and mypy'
	@echo 'make schemas  docs/schema from the code'
	@echo 'make install-device    unit, user, sound, udev rule into DESTDIR=/ for BOARD=$(BOARD); see docs/device.md'
	@echo 'make uninstall-device  take them away again; configuration and data stay'
	@echo 'make clean    remove what was built, but not .venv'

venv: $(STAMP) mic

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo 'no Python 3.11, 3.12 or 3.13 found; say make PYTHON=/path/to/python'; exit 1; }
	@echo 'installing into .venv, which takes some minutes the first time'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP_INSTALL) -e '.[agent,convert,dev,bench]'
	@$(BIN)/python -m compileall -qq -j 0 .venv/lib >/dev/null 2>&1 || true  # pip takes one core; some templates fail
	@rm -f .venv/.mic && touch $@

# An extra of its own since it has no wheel: everything but the live microphone works without it.
mic: $(STAMP)
	@test -e .venv/.mic || \
	if ! echo '#include <portaudio.h>' | cc -E - >/dev/null 2>&1; then \
		echo 'no PyAudio, so no live microphone: it needs gcc and portaudio.h (apt install gcc portaudio19-dev)'; \
	elif $(PIP_INSTALL) -e '.[mic]' >.venv/mic.log 2>&1; then \
		touch .venv/.mic; \
	else \
		echo 'no PyAudio, so no live microphone: it does not build, see .venv/mic.log'; \
	fi

# For tests; those that find a program missing skip themselves and say so.
system:
	@if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] && ! dpkg -s $(SYSTEM_PACKAGES) >/dev/null 2>&1; then \
		echo 'installing $(SYSTEM_PACKAGES)'; \
		export DEBIAN_FRONTEND=noninteractive; \
		{ apt-get update -qq && apt-get install -qq -y --no-install-recommends $(SYSTEM_PACKAGES); } >/dev/null \
		|| echo 'that failed; the tests that need them will be skipped'; \
	fi

bundle: $(STAMP) $(BUNDLE)

# A bundle is kept under a hash over all that it is made from, so that equal sources build it once.
$(BUNDLE): $(BUNDLE_SOURCES) | $(STAMP)
	@mkdir -p build "$(CACHE)"
	@key=$$(sha256sum $(BUNDLE_SOURCES) | sha256sum | cut -c -16); kept="$(CACHE)/$(RECIPE)-$$key"; \
	if [ -e "$$kept.tflite" ]; then \
		echo "$@: taken from $$kept.tflite"; \
		cp "$$kept.json" build/$(RECIPE).json && cp "$$kept.tflite" $@; \
	else \
		echo 'building $@'; \
		$(BIN)/python -m convert build $(RECIPE) --out build && \
		cp build/$(RECIPE).json "$$kept.json" && cp $@ "$$kept.part" && mv "$$kept.part" "$$kept.tflite"; \
	fi

demo: venv bundle
	@$(BIN)/python demo/demo.py $(BUNDLE)

lint: $(STAMP)
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/mypy demo/demo.py
	@$(BIN)/mypy tests/benchmarks

# Two processes, each with one thread: much is small, or waits. A file stays together, for what its tests share.
test: system venv lint bundle
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# Not part of `test`: a machine that does anything else measures wrongly. BENCH='cost accuracy --limit 20' works too.
bench: venv bundle
	@$(BIN)/python -m tests.benchmarks $(BENCH) --bundle $(BUNDLE)

# Coverage-guided by atheris where it has a wheel, else by hypothesis; kept out of .venv, which it is no part of.
fuzz: venv
	@test -d .fuzz/atheris || $(PIP_INSTALL) --no-deps --target .fuzz atheris 2>/dev/null || echo 'no atheris'
	@PYTHONPATH=.fuzz $(BIN)/python -m tests.fuzzing $(FUZZ) --minutes $(or $(MINUTES),10)

# Hours in full; SOAK='fleet outbox' for some.
soak: system venv
	@PYTHONPATH=tests:. $(BIN)/python -m soak $(SOAK)

schemas: $(STAMP)
	@$(BIN)/python -m agent.schemas docs/schema

# The configuration is the operator's once it is there. A board has not every file, and the bundle may come another way.
install-device:
	@test -d $(BOARD_FILES) || { echo 'BOARD=$(BOARD): there is no $(BOARD_FILES)'; exit 1; }
	@set -e; for pair in $(DEVICE_FILES); do \
		if [ -e "$${pair%%:*}" ]; then install -D -m 644 "$${pair%%:*}" "$(DESTDIR)/$${pair#*:}"; fi; \
	done
	@test -e "$(DESTDIR)/etc/whisperlet/agent.toml" || \
		install -D -m 640 $(BOARD_FILES)/agent.toml "$(DESTDIR)/etc/whisperlet/agent.toml"

uninstall-device:
	@for pair in $(DEVICE_FILES); do rm -f "$(DESTDIR)/$${pair#*:}"; done
	@rmdir -p --ignore-fail-on-non-empty "$(DESTDIR)/usr/lib/systemd/system/whisperlet-agent.service.d" \
		"$(DESTDIR)/usr/share/whisperlet" "$(DESTDIR)/usr/share/doc/whisperlet" 2>/dev/null || true

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
