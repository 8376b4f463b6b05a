// SPDX-License-Identifier: MIT
// Runs the cases whose names contain every filter and ends with "N passed, N failed".
//
//   harness [--order ascending|descending|warps|random|all] [--seed N] [--shard K/N] [--list] [--verbose] [--kernels]
//   [filter ...]
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "access.h"
#include "expectation.h"
#include "places.h"
#include "run.h"
#include "volumes.h"

#if defined(KPFUSED_SIMT_ASAN)
#include <sanitizer/common_interface_defs.h>
#endif

namespace {

std::vector<simt::Order> all_orders() {
  return {simt::Order::ascending, simt::Order::random, simt::Order::descending, simt::Order::warps};
}

struct Options {
  // Where every access is followed, races are found in any order.
  std::vector<simt::Order> orders =
      simt::access::kEnabled ? std::vector{simt::Order::ascending, simt::Order::random} : all_orders();
  uint64_t seed = 1;
  int shard = 0, shards = 1;
  bool list = false, verbose = false, kernels = false;
  std::vector<std::string> filters;
};

[[noreturn]] void usage(const char* complaint) {
  std::fprintf(stderr,
               "%s\nusage: harness [--order NAME|all] [--seed N] [--shard K/N] [--list] [--verbose] [--kernels] "
               "[filter ...]\n",
               complaint);
  std::exit(2);
}

std::vector<simt::Order> parse_order(const std::string& name) {
  for (int i = 0; i < simt::kOrders; ++i)
    if (name == simt::order_name(static_cast<simt::Order>(i))) return {static_cast<simt::Order>(i)};
  if (name != "all") usage("unknown order");
  return all_orders();
}

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    const auto value = [&] { return ++i < argc ? std::string(argv[i]) : (usage("a value is missing"), ""); };
    if (word == "--order") {
      options.orders = parse_order(value());
    } else if (word == "--seed") {
      options.seed = std::strtoull(value().c_str(), nullptr, 10);
    } else if (word == "--shard") {
      if (std::sscanf(value().c_str(), "%d/%d", &options.shard, &options.shards) != 2 || options.shards < 1)
        usage("--shard takes K/N");
    } else if (word == "--list") {
      options.list = true;
    } else if (word == "--kernels") {
      options.kernels = true;
    } else if (word == "--verbose") {
      options.verbose = true;
    } else if (word[0] == '-') {
      usage("unknown option");
    } else {
      options.filters.push_back(word);
    }
  }
  return options;
}

// A case, of whatever steps.
struct Test {
  std::string group, name;
  int orders;
  std::function<harness::Outcome(const std::vector<simt::Order>&, uint64_t)> run;
};

std::vector<Test> all_tests() {
  std::vector<Test> tests;
  const auto add = [&](const harness::Case& maps, std::string name, auto run) {
    tests.push_back({maps.group, std::move(name), maps.orders, std::move(run)});
  };
  for (const harness::Case& c : harness::all_cases())
    add(c, c.name(), [c](const auto& orders, uint64_t seed) { return harness::run_case(c, orders, seed); });
  for (const harness::ExpectationCase& c : harness::expectation_cases())
    add(c.maps, c.name(), [c](const auto& orders, uint64_t seed) { return harness::run_expectation(c, orders, seed); });
  for (const harness::VolumeCase& c : harness::volume_cases())
    tests.push_back({"volumes", c.name(), simt::kOrders, [c](const auto& orders, uint64_t) { return harness::run_volume(c, orders); }});
  tests.push_back({"places", "places", 1, [](const auto&, uint64_t) { return harness::run_places(); }});
  return tests;
}

bool matches(const std::string& name, const std::vector<std::string>& filters) {
  for (const std::string& filter : filters)
    if (name.find(filter) == std::string::npos) return false;
  return true;
}

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

struct Group {
  std::string name;
  int passed = 0, failed = 0;
  double worst = 0, started = seconds();

  void report() const {
    if (passed + failed == 0) return;
    std::printf("%-24s %4d passed %4d failed   largest error %3.0f%% of its tolerance   %5.1f s\n", name.c_str(),
                passed, failed, 100 * worst, seconds() - started);
    std::fflush(stdout);
  }
};

}  // namespace

int main(int argc, char** argv) {
  const Options options = parse(argc, argv);
#if defined(KPFUSED_SIMT_ASAN)
  __sanitizer_set_death_callback([] { std::fprintf(stderr, "  case: %s\n", simt::context); });
#endif
  Group group;
  int passed = 0, failed = 0, number = 0;
  for (const Test& test : all_tests()) {
    if (!matches(test.name, options.filters) || number++ % options.shards != options.shard) continue;
    if (options.list) {
      std::printf("%s\n", test.name.c_str());
      continue;
    }
    if (group.name != test.group) {
      group.report();
      group = Group{};
      group.name = test.group;
    }
    std::vector<simt::Order> orders = options.orders;
    if (static_cast<int>(orders.size()) > test.orders) orders.erase(orders.begin(), orders.end() - test.orders);
    const double started = seconds();
    const harness::Outcome outcome = test.run(orders, options.seed);
    if (options.verbose) std::printf("%6.2f s  %s\n", seconds() - started, test.name.c_str());
    for (const std::string& failure : outcome.failures)
      std::printf("FAILED %s: %s\n", test.name.c_str(), failure.c_str());
    ++(outcome.failures.empty() ? group.passed : group.failed);
    ++(outcome.failures.empty() ? passed : failed);
    if (outcome.worst > group.worst) group.worst = outcome.worst;
  }
  group.report();
  if (options.list) return 0;
  if (options.kernels)
    for (const std::string& kernel : simt::kernels_run()) std::printf("kernel %s\n", kernel.c_str());
  std::printf("%d passed, %d failed\n", passed, failed);
  // A filter that matches nothing has shown nothing.
  return failed == 0 && passed > 0 ? 0 : 1;
}
