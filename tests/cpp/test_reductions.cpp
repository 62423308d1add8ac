// reductions.h: states merged in any split and order against one sum in long double.

#include "reductions.h"

#include <algorithm>
#include <limits>

#include "check.h"

namespace {

using namespace flashpair;
using namespace flashpair::common;
using Wide = long double;

constexpr Reduction kReductions[] = {Reduction::sum,          Reduction::count,   Reduction::logsumexp,
                                     Reduction::softmax_mean, Reduction::moments, Reduction::max};
constexpr int kState = 5;  // largest reduction_state

// One pair: score, weight, similarity.
struct Pair {
  double f, w, s;
};
struct State {
  double data[kState];
};
struct Values {
  Wide data[5];
};

State empty(Reduction reduction) {
  State state{};
  state_init(reduction, state.data);
  return state;
}

State of_pair(Reduction reduction, const Pair& p) {
  switch (reduction) {
    case Reduction::sum: return {{p.w * p.f}};
    case Reduction::count: return {{p.f <= 0 ? 0.0 : 1.0}};
    case Reduction::logsumexp: return {{p.f, p.w}};
    case Reduction::softmax_mean: return {{p.f, p.w, 0, p.s}};
    case Reduction::moments: return {{1, p.s, p.s * p.s, p.s, p.s}};
    case Reduction::max: return {{p.f}};
  }
  return {};
}

State merged(Reduction reduction, State a, const State& b) {
  state_merge(reduction, a.data, b.data);
  return a;
}

Values finished(Reduction reduction, const State& state) {
  double out[5] = {};
  state_finish(reduction, state.data, out, 1);
  Values values{};
  for (int k = 0; k < reduction_slots(reduction); ++k) values.data[k] = out[k];
  return values;
}

Values direct(Reduction reduction, const std::vector<Pair>& pairs) {
  Wide sum = 0, count = 0, top = -INFINITY, low = INFINITY, high = -INFINITY, plain = 0, squares = 0;
  for (const Pair& p : pairs) {
    sum += Wide(p.w) * p.f, count += !(p.f <= 0);
    top = std::max(top, Wide(p.f)), low = std::min(low, Wide(p.s)), high = std::max(high, Wide(p.s));
    plain += p.s;
  }
  Wide total = 0, mean = 0;
  const Wide n = Wide(pairs.size()), average = pairs.empty() ? 0 : plain / n;
  for (const Pair& p : pairs) {
    const Wide e = p.w * std::exp(Wide(p.f) - top);
    total += e, mean += e * p.s;
    squares += (p.s - average) * (p.s - average);
  }
  const Wide lse = pairs.empty() ? -Wide(INFINITY) : top + std::log(total);
  switch (reduction) {
    case Reduction::sum: return {{sum}};
    case Reduction::count: return {{count}};
    case Reduction::logsumexp: return {{lse}};
    case Reduction::softmax_mean: return {{pairs.empty() ? 0 : mean / total, lse}};
    case Reduction::moments: return {{n, average, pairs.empty() ? 0 : squares / n, low, high}};
    case Reduction::max: return {{top}};
  }
  return {};
}

// Merges a list of states pairwise in a random order; neighbours only, so that it is one bracketing of the list.
State bracketed(Reduction reduction, std::vector<State> states, check::Random& random) {
  if (states.empty()) return empty(reduction);
  while (states.size() > 1) {
    const size_t at = random.below(states.size() - 1);
    states[at] = merged(reduction, states[at], states[at + 1]);
    states.erase(states.begin() + at + 1);
  }
  return states[0];
}

std::vector<Pair> random_pairs(check::Random& random, size_t count, double reach) {
  std::vector<Pair> pairs(count);
  for (Pair& p : pairs) p = {random.uniform(-reach, reach), random.uniform(0.1, 2), random.uniform(-1, 1)};
  return pairs;
}

void check_values(Reduction reduction, const Values& got, const Values& want, Wide scale) {
  for (int k = 0; k < reduction_slots(reduction); ++k)
    CHECK_CLOSE(got.data[k], want.data[k], 1e-14L * (scale + std::fabs(want.data[k])));
}

TEST(any_split_gives_the_direct_result) {
  check::Random random(1);
  for (Reduction reduction : kReductions)
    for (int trial = 0; trial < 400; ++trial) {
      const double reach = trial % 3 == 0 ? 1 : trial % 3 == 1 ? 80 : 1e4;
      const std::vector<Pair> pairs = random_pairs(random, random.below(40), reach);
      check::context() = "reduction " + std::to_string(int(reduction)) + ", " + std::to_string(pairs.size()) +
                         " pairs, reach " + check::number(reach);
      std::vector<State> states;
      for (const Pair& p : pairs) {
        states.push_back(of_pair(reduction, p));
        if (random.below(4) == 0) states.push_back(empty(reduction));
      }
      Wide scale = 1;
      for (const Pair& p : pairs) scale += reduction == Reduction::sum ? std::fabs(p.f * p.w) : 1;
      check_values(reduction, finished(reduction, bracketed(reduction, states, random)), direct(reduction, pairs),
                   scale);
    }
}

TEST(empty_states_are_neutral) {
  check::Random random(2);
  for (Reduction reduction : kReductions)
    for (int trial = 0; trial < 100; ++trial) {
      State state = empty(reduction);
      for (const Pair& p : random_pairs(random, random.below(4), 50))
        state = merged(reduction, state, of_pair(reduction, p));
      const State after = merged(reduction, state, empty(reduction)),
                  before = merged(reduction, empty(reduction), state);
      for (int k = 0; k < reduction_state(reduction); ++k) {
        CHECK(after.data[k] == state.data[k]);
        CHECK(before.data[k] == state.data[k]);
      }
    }
}

TEST(empty_rows_have_their_documented_values) {
  const Wide infinity = INFINITY;
  const Values want[] = {{{0}},        {{0}}, {{-infinity}}, {{0, -infinity}}, {{0, 0, 0, infinity, -infinity}},
                         {{-infinity}}};
  for (Reduction reduction : kReductions)
    check_values(reduction, finished(reduction, empty(reduction)), want[int(reduction)], 0);
}

TEST(merging_is_associative_within_rounding) {
  check::Random random(3);
  for (Reduction reduction : kReductions)
    for (int trial = 0; trial < 400; ++trial) {
      State part[3];
      for (State& state : part) {
        state = empty(reduction);
        for (const Pair& p : random_pairs(random, random.below(3), 100))
          state = merged(reduction, state, of_pair(reduction, p));
      }
      const State left = merged(reduction, merged(reduction, part[0], part[1]), part[2]);
      const State right = merged(reduction, part[0], merged(reduction, part[1], part[2]));
      check::context() = "reduction " + std::to_string(int(reduction));
      check_values(reduction, finished(reduction, left), finished(reduction, right), 600);
    }
}

TEST(nan_stays) {
  check::Random random(4);
  for (Reduction reduction : kReductions) {
    if (reduction == Reduction::count) continue;  // counts it: not below 0
    for (size_t at = 0; at < 7; ++at) {
      std::vector<Pair> pairs = random_pairs(random, 7, 5);
      pairs[at].f = pairs[at].s = NAN;
      std::vector<State> states;
      for (const Pair& p : pairs) states.push_back(of_pair(reduction, p));
      const Values got = finished(reduction, bracketed(reduction, states, random));
      for (int k = reduction == Reduction::moments; k < reduction_slots(reduction); ++k) CHECK(std::isnan(got.data[k]));
    }
  }
  CHECK(of_pair(Reduction::count, {NAN, 1, 0}).data[0] == 1);
}

// An infinite score gives an infinity or NaN, never a finite number that looks right.
TEST(infinities_show) {
  check::Random random(5);
  for (Reduction reduction : kReductions)
    for (size_t at = 0; at < 7; ++at) {
      if (reduction == Reduction::count) continue;  // of a sign only
      std::vector<Pair> pairs = random_pairs(random, 7, 5);
      pairs[at].f = pairs[at].s = INFINITY;
      std::vector<State> states;
      for (const Pair& p : pairs) states.push_back(of_pair(reduction, p));
      const Values got = finished(reduction, bracketed(reduction, states, random));
      if (reduction == Reduction::moments) {
        CHECK(got.data[4] == Wide(INFINITY));
        CHECK(std::isfinite(got.data[3]));
        CHECK(!std::isfinite(got.data[1]));
        CHECK(!std::isfinite(got.data[2]));
        continue;
      }
      for (int k = 0; k < reduction_slots(reduction); ++k) CHECK(!std::isfinite(got.data[k]));
    }
}

TEST(a_sum_of_zero_is_an_empty_state) {
  State state = of_pair(Reduction::logsumexp, {3, 2, 0});
  const State nothing = {{-INFINITY, 0}};
  CHECK(merged(Reduction::logsumexp, state, nothing).data[0] == 3);
  CHECK(merged(Reduction::logsumexp, nothing, state).data[0] == 3);
}

TEST(a_softmax_of_one_pair_has_its_similarity_exactly) {
  check::Random random(6);
  for (int trial = 0; trial < 200; ++trial) {
    const Pair p = random_pairs(random, 1, 1e4)[0];
    CHECK(finished(Reduction::softmax_mean, of_pair(Reduction::softmax_mean, p)).data[0] == Wide(p.s));
    // Likewise where all others are too small to count.
    const Pair far = {p.f - 800, 1, -p.s};
    for (const State& state :
         {merged(Reduction::softmax_mean, of_pair(Reduction::softmax_mean, p), of_pair(Reduction::softmax_mean, far)),
          merged(Reduction::softmax_mean, of_pair(Reduction::softmax_mean, far), of_pair(Reduction::softmax_mean, p))})
      CHECK(finished(Reduction::softmax_mean, state).data[0] == Wide(p.s));
  }
}

TEST(equal_similarities_have_no_variance) {
  State state = empty(Reduction::moments);
  for (int k = 0; k < 1000; ++k) state = merged(Reduction::moments, state, of_pair(Reduction::moments, {0, 1, 0.1}));
  const Values got = finished(Reduction::moments, state);
  CHECK(got.data[2] >= 0);
  CHECK(got.data[2] <= 1e-15L);
}

TEST(a_maximum_is_one_of_its_scores) {
  check::Random random(7);
  for (int trial = 0; trial < 200; ++trial) {
    const std::vector<Pair> pairs = random_pairs(random, 1 + random.below(9), 1e4);
    std::vector<State> states;
    for (const Pair& p : pairs) states.push_back(of_pair(Reduction::max, p));
    const Values got = finished(Reduction::max, bracketed(Reduction::max, states, random));
    CHECK(got.data[0] == direct(Reduction::max, pairs).data[0]);
  }
  // -inf does not win over a score, nor a score over NaN, in any order.
  const State nothing = empty(Reduction::max), low = {{-3}}, lowest = {{-INFINITY}}, bad = {{NAN}};
  for (const State& state : {merged(Reduction::max, low, lowest), merged(Reduction::max, lowest, low)})
    CHECK(state.data[0] == -3);
  for (const State& other : {nothing, low, lowest, bad})
    for (const State& state : {merged(Reduction::max, bad, other), merged(Reduction::max, other, bad)})
      CHECK(std::isnan(state.data[0]));
}

TEST(finish_writes_its_slots_a_stride_apart) {
  for (Reduction reduction : kReductions) {
    float out[50];
    std::fill(out, out + 50, -7.0f);
    state_finish(reduction, of_pair(reduction, {2, 1, 0.5}).data, out, 10);
    for (int k = 0; k < 50; ++k) CHECK((out[k] != -7.0f) == (k % 10 == 0 && k / 10 < reduction_slots(reduction)));
  }
}

}  // namespace
