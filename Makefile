# A thin front for CMake's presets (CMakePresets.json). `make help` lists the targets.
.DEFAULT_GOAL := all
MAKEFLAGS += --no-print-directory
PREFIX ?= /usr/local
FUZZ_SECONDS ?= 60
CUDA ?= AUTO
cuda = $(if $(filter 1 ON,$(CUDA)),-DMOETUNE_CUDA=ON,$(if $(filter 0 OFF,$(CUDA)),-DMOETUNE_CUDA=OFF))
# CUDA's compiler is wanted where it is asked for, or where a GPU is visible and it is not refused.
with_cuda = $(if $(filter 1 ON,$(CUDA)),yes,$(if $(filter AUTO,$(CUDA)),$(wildcard /dev/nvidiactl)))
C_FILES = $(shell git ls-files -co --exclude-standard '*.c' '*.h' '*.cu' '*.cuh')

.NOTPARALLEL:
.PHONY: all setup test demo debug asan dist fuzz format format-check tidy layers clean install help

all: ## build build/release/moetune and the tests beside it (CUDA=1: with CUDA, else where a GPU is)
	@tools/build.sh release $(cuda)

setup: ## install what the machine lacks (apt-get, says what first; nvcc for a GPU)
	@tools/setup.sh $(if $(with_cuda),--cuda)

test: setup all ## set up, build, run all tests
	@ctest --test-dir build/release --output-on-failure

demo: setup all ## set up, build, fine-tune the shipped model on the shipped data
	@tools/demo.sh build/release/moetune

debug: ## build without optimisation into build/debug
	@tools/build.sh debug

asan: ## build with AddressSanitizer and UBSan into build/asan and run all tests there
	@tools/build.sh asan
	@ctest --test-dir build/asan --output-on-failure

dist: ## build and pack into build/moetune-dist what runs on another Linux machine
	@tools/setup.sh --dist
	@tools/build.sh dist
	@tools/dist.sh build/moetune-dist

fuzz: ## build the fuzzers (clang) and run each for FUZZ_SECONDS (60)
	@tools/build.sh fuzz
	@tools/fuzz.sh build/fuzz $(FUZZ_SECONDS)

format: ## lay out all C files with clang-format
	@clang-format -i $(C_FILES)

format-check: ## fail where clang-format would change something
	@clang-format --dry-run -Werror $(C_FILES)

tidy: ## clang-tidy over src/
	@tools/build.sh clang --configure-only
	@tools/tidy.sh build/clang

layers: ## check that includes point down only and that no banned function is called
	@tools/check_layers.sh

clean: ## remove build/
	@rm -rf build

install: all ## install under PREFIX (/usr/local), DESTDIR honoured
	@cmake --install build/release --prefix $(PREFIX)

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile
