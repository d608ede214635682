// SPDX-License-Identifier: Apache-2.0
#include <pybind11/stl.h>

#include <string>
#include <type_traits>

#include "bindings/bind.h"
#include "scheduler/errors.h"
#include "scheduler/scheduler.h"

namespace ivg::bindings {

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

// A numpy view of a plan's array. It stays valid until the next plan; `owner` keeps the memory
// alive.
template <class T>
Array<T> view(const std::vector<T>& data, const py::object& owner) {
  return Array<T>(static_cast<py::ssize_t>(data.size()), data.data(), owner);
}

template <class T>
Array<T> view(const std::vector<T>& data, const py::object& owner, py::ssize_t columns) {
  const auto size = static_cast<py::ssize_t>(data.size());
  return Array<T>({columns == 0 ? 0 : size / columns, columns}, data.data(), owner);
}

template <class T>
const T* checked(const Array<T>& array, const char* name,
                 std::initializer_list<py::ssize_t> shape) {
  const bool matches = array.ndim() == static_cast<py::ssize_t>(shape.size()) &&
                       std::equal(shape.begin(), shape.end(), array.shape());
  if (!matches) {
    std::string wanted, got;
    for (const auto n : shape) wanted += std::to_string(n) + ",";
    for (py::ssize_t i = 0; i < array.ndim(); ++i) got += std::to_string(array.shape(i)) + ",";
    throw py::value_error(std::string(name) + " must have shape (" + wanted + "), got (" + got +
                          ")");
  }
  return array.data();
}

// The typed errors of ivg_fast.errors, raised from what the core throws.
void translate(std::exception_ptr pointer) {
  const auto raise = [](const char* name, const py::object& error_args) {
    const py::object type = py::module_::import("ivg_fast.errors").attr(name);
    PyErr_SetObject(type.ptr(), type(*error_args.cast<py::tuple>()).ptr());
  };
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const InvalidParameter& e) {
    raise("InvalidParameterError", py::make_tuple(e.parameter, e.value, e.requirement));
  } catch (const CapacityExceeded& e) {
    raise("CapacityError", py::make_tuple(e.what()));
  } catch (const QueueFull& e) {
    raise("QueueFullError", py::make_tuple(e.what()));
  }
}

// The arrays of a plan as properties that view the scheduler's memory.
template <class Plan>
struct PlanView {
  const Plan* plan;
  py::object owner;
};

template <class Plan, class T>
void def_array(py::class_<PlanView<Plan>>& cls, const char* name, std::vector<T> Plan::* member) {
  cls.def_property_readonly(
      name, [member](const PlanView<Plan>& v) { return view(v.plan->*member, v.owner); });
}

template <class Plan, class T>
void def_matrix(py::class_<PlanView<Plan>>& cls, const char* name, std::vector<T> Plan::* member,
                int32_t Plan::* columns) {
  cls.def_property_readonly(name, [=](const PlanView<Plan>& v) {
    return view(v.plan->*member, v.owner, v.plan->*columns);
  });
}

template <class Plan>
void def_table_width(py::class_<PlanView<Plan>>& cls) {
  cls.def_property_readonly("table_width",
                            [](const PlanView<Plan>& v) { return v.plan->table_width; });
}

void bind_plans(py::module_& m) {
  using Burst = PlanView<BurstPlan>;
  py::class_<Burst> burst(m, "BurstPlan",
                          "What runs next; arrays are views, valid until the next plan().");
  burst.def_property_readonly("num_steps", [](const Burst& v) { return v.plan->num_steps; });
  def_table_width(burst);
  def_array(burst, "request_ids", &BurstPlan::request_ids);
  def_array(burst, "prompt_blocks", &BurstPlan::prompt_blocks);
  def_array(burst, "num_samples", &BurstPlan::num_samples);
  def_array(burst, "prefill_request_ids", &BurstPlan::prefill_request_ids);
  def_array(burst, "prefill_begin", &BurstPlan::prefill_begin);
  def_array(burst, "prefill_end", &BurstPlan::prefill_end);
  def_matrix(burst, "prefill_tables", &BurstPlan::prefill_tables, &BurstPlan::table_width);
  def_array(burst, "row_request", &BurstPlan::row_request);
  def_array(burst, "row_token", &BurstPlan::row_token);
  def_array(burst, "row_position", &BurstPlan::row_position);
  def_array(burst, "row_slot", &BurstPlan::row_slot);
  def_array(burst, "row_roles", &BurstPlan::row_roles);
  def_matrix(burst, "row_tables", &BurstPlan::row_tables, &BurstPlan::table_width);
  burst.def_property_readonly("copies", [](const Burst& v) {
    const auto* first = reinterpret_cast<const int32_t*>(v.plan->copies.data());
    static_assert(sizeof(BlockCopy) == 2 * sizeof(int32_t) && std::is_standard_layout_v<BlockCopy>);
    return Array<int32_t>({static_cast<py::ssize_t>(v.plan->copies.size()), py::ssize_t{2}}, first,
                          v.owner);
  });
  def_array(burst, "sample_request", &BurstPlan::sample_request);
  def_array(burst, "sample_row", &BurstPlan::sample_row);
  def_array(burst, "sample_candidate", &BurstPlan::sample_candidate);
  def_array(burst, "sample_position", &BurstPlan::sample_position);
  def_array(burst, "sample_steps", &BurstPlan::sample_steps);
  def_array(burst, "sample_seed", &BurstPlan::sample_seed);
  burst.def_property_readonly("sample_slots", [](const Burst& v) {
    const auto samples = static_cast<py::ssize_t>(v.plan->sample_request.size());
    return Array<int32_t>({static_cast<py::ssize_t>(v.plan->num_steps), samples},
                          v.plan->sample_slots.data(), v.owner);
  });
  def_matrix(burst, "sample_tables", &BurstPlan::sample_tables, &BurstPlan::table_width);

  using Score = PlanView<ScorePlan>;
  py::class_<Score> score(m, "ScorePlan",
                          "The candidates to score; arrays are views, valid until the next one.");
  def_table_width(score);
  score.def_property_readonly("max_new_tokens",
                              [](const Score& v) { return v.plan->max_new_tokens; });
  def_array(score, "request_ids", &ScorePlan::request_ids);
  def_array(score, "num_rows", &ScorePlan::num_rows);
  def_array(score, "prompt_blocks", &ScorePlan::prompt_blocks);
  def_array(score, "row_request", &ScorePlan::row_request);
  def_array(score, "row_candidate", &ScorePlan::row_candidate);
  def_array(score, "row_start", &ScorePlan::row_start);
  def_array(score, "row_length", &ScorePlan::row_length);
  def_array(score, "row_finish", &ScorePlan::row_finish);
  def_array(score, "row_adds_eos", &ScorePlan::row_adds_eos);
  def_array(score, "row_twin", &ScorePlan::row_twin);
  def_array(score, "row_reward", &ScorePlan::row_reward);
  def_matrix(score, "row_tokens", &ScorePlan::row_tokens, &ScorePlan::max_new_tokens);
  def_matrix(score, "row_tables", &ScorePlan::row_tables, &ScorePlan::table_width);
}

py::dict candidate_to_dict(const std::vector<TokenRecord>& history, const Candidate& candidate) {
  const auto column = [&](auto TokenRecord::* member) {
    using T = std::decay_t<decltype(history[0].*member)>;
    Array<T> array(static_cast<py::ssize_t>(history.size()));
    T* out = array.mutable_data();
    for (const TokenRecord& record : history) *out++ = record.*member;
    return array;
  };
  py::dict d;
  d["candidate_id"] = candidate.id;
  d["finish"] = static_cast<int>(candidate.finish);
  d["stop_index"] = candidate.stop_index;
  d["score"] = candidate.score;
  d["token_ids"] = column(&TokenRecord::token);
  d["logprobs"] = column(&TokenRecord::logprob);
  d["base_logprobs"] = column(&TokenRecord::base_logprob);
  d["rewards"] = column(&TokenRecord::reward);
  return d;
}

void bind_block_pool(py::module_& m) {
  py::class_<BlockPool>(m, "BlockPool", "Reference-counted ids of KV blocks of 16 tokens.")
      .def(py::init<int32_t>(), py::arg("num_blocks"))
      .def("allocate", &BlockPool::allocate)
      .def("share", &BlockPool::share, py::arg("block"))
      .def("free", &BlockPool::free, py::arg("block"))
      .def(
          "fork",
          [](BlockPool& pool, const std::vector<int32_t>& table, int32_t num_tokens) {
            std::vector<BlockCopy> copies;
            auto child = pool.fork(table, num_tokens, &copies);
            std::vector<std::pair<int32_t, int32_t>> pairs;
            for (const BlockCopy& copy : copies) pairs.emplace_back(copy.src, copy.dst);
            return std::make_pair(child, pairs);
          },
          py::arg("table"), py::arg("num_tokens"), "Returns (child table, [(src, dst)]).")
      .def("ref_count", &BlockPool::ref_count, py::arg("block"))
      .def_property_readonly("num_blocks", &BlockPool::num_blocks)
      .def_property_readonly("num_free", &BlockPool::num_free)
      .def_property_readonly("num_used", &BlockPool::num_used)
      .def("check_integrity", &BlockPool::check_integrity);
}

}  // namespace

void bind_scheduler(py::module_& m) {
  py::register_exception_translator(&translate);
  m.attr("BLOCK_SIZE") = kBlockSize;
  bind_block_pool(m);
  bind_plans(m);

  py::class_<Scheduler>(m, "Scheduler",
                        "Admission, cohorts, bursts, selection: see csrc/scheduler/scheduler.h.")
      .def(py::init([](int32_t num_blocks, int32_t num_roles, int32_t max_num_rows,
                       int32_t max_burst_steps, int32_t max_join_steps, int32_t max_queued_requests,
                       int32_t max_prefill_tokens) {
             SchedulerConfig config;
             config.num_blocks = num_blocks;
             config.num_roles = num_roles;
             config.max_num_rows = max_num_rows;
             config.max_burst_steps = max_burst_steps;
             config.max_join_steps = max_join_steps;
             config.max_queued_requests = max_queued_requests;
             config.max_prefill_tokens = max_prefill_tokens;
             return std::make_unique<Scheduler>(config);
           }),
           py::kw_only(), py::arg("num_blocks"), py::arg("num_roles"), py::arg("max_num_rows"),
           py::arg("max_burst_steps"), py::arg("max_join_steps") = -1,
           py::arg("max_queued_requests") = -1, py::arg("max_prefill_tokens") = -1)
      .def(
          "add_request",
          [](Scheduler& s, std::vector<int32_t> prompt_lens, uint32_t step_roles,
             uint32_t settle_roles, int32_t guidance, int32_t beam_width, int32_t num_candidates,
             int32_t chunk_length, int32_t max_tokens, int32_t num_outputs, uint64_t seed,
             bool has_scorer, bool dedup_finished, bool score_eos_on_truncation, bool reads_eos,
             bool is_scored_late, int32_t max_burst_steps, bool only_check) {
            RequestSpec spec;
            spec.prompt_lens = std::move(prompt_lens);
            spec.step_roles = step_roles;
            spec.settle_roles = settle_roles;
            spec.guidance = guidance;
            spec.beam_width = beam_width;
            spec.num_candidates = num_candidates;
            spec.chunk_length = chunk_length;
            spec.max_tokens = max_tokens;
            spec.num_outputs = num_outputs;
            spec.seed = seed;
            spec.has_scorer = has_scorer;
            spec.dedup_finished = dedup_finished;
            spec.score_eos_on_truncation = score_eos_on_truncation;
            spec.reads_eos = reads_eos;
            spec.is_scored_late = is_scored_late;
            spec.max_burst_steps = max_burst_steps;
            if (!only_check) return s.add_request(std::move(spec));
            s.check_request(std::move(spec));
            return int64_t{-1};
          },
          py::kw_only(), py::arg("prompt_lens"), py::arg("step_roles") = 1,
          py::arg("settle_roles") = 0, py::arg("guidance") = 0, py::arg("beam_width") = 1,
          py::arg("num_candidates") = 1, py::arg("chunk_length") = 0, py::arg("max_tokens"),
          py::arg("num_outputs") = 1, py::arg("seed") = 0, py::arg("has_scorer") = false,
          py::arg("dedup_finished") = false, py::arg("score_eos_on_truncation") = false,
          py::arg("reads_eos") = false, py::arg("is_scored_late") = false,
          py::arg("max_burst_steps") = 0, py::arg("only_check") = false)
      .def(
          "abort",
          [](Scheduler& s, int64_t request_id, bool is_deadline) {
            return s.abort(request_id, is_deadline ? Finish::kDeadline : Finish::kAbort);
          },
          py::arg("request_id"), py::kw_only(), py::arg("is_deadline") = false)
      .def("plan",
           [](const py::object& self) {
             auto& s = self.cast<Scheduler&>();
             const BurstPlan* plan;
             {
               py::gil_scoped_release release;
               plan = &s.plan();
             }
             return PlanView<BurstPlan>{plan, self};
           })
      .def(
          "commit_tokens",
          [](Scheduler& s, const Array<int32_t>& tokens, const Array<float>& logprobs,
             const Array<float>& base_logprobs, const Array<float>& rewards,
             const Array<int32_t>& num_tokens, const Array<uint8_t>& finish,
             const Array<int32_t>& stop_index) {
            if (tokens.ndim() != 2) throw py::value_error("tokens must have two dimensions");
            const auto steps = tokens.shape(0), samples = tokens.shape(1);
            CommittedTokens c{tokens.data(),
                              checked(logprobs, "logprobs", {steps, samples}),
                              checked(base_logprobs, "base_logprobs", {steps, samples}),
                              checked(rewards, "rewards", {steps, samples}),
                              checked(num_tokens, "num_tokens", {samples}),
                              checked(finish, "finish", {samples}),
                              checked(stop_index, "stop_index", {samples}),
                              static_cast<int32_t>(steps),
                              static_cast<int32_t>(samples)};
            py::gil_scoped_release release;
            s.commit_tokens(c);
          },
          py::arg("tokens"), py::arg("logprobs"), py::arg("base_logprobs"), py::arg("rewards"),
          py::arg("num_tokens"), py::arg("finish"), py::arg("stop_index"))
      .def("give_up", &Scheduler::give_up, py::call_guard<py::gil_scoped_release>())
      .def("plan_scores",
           [](const py::object& self) {
             auto& s = self.cast<Scheduler&>();
             const ScorePlan* plan;
             {
               py::gil_scoped_release release;
               plan = &s.plan_scores();
             }
             return PlanView<ScorePlan>{plan, self};
           })
      .def(
          "commit_scores",
          [](Scheduler& s, int64_t request_id, const Array<double>& scores,
             const std::optional<Array<float>>& rewards) {
            if (scores.ndim() != 1) throw py::value_error("scores must have one dimension");
            const auto rows = scores.shape(0);
            const py::ssize_t stride = rewards && rewards->ndim() == 2 ? rewards->shape(1) : 0;
            const float* measured =
                rewards ? checked(*rewards, "rewards", {rows, stride}) : nullptr;
            py::gil_scoped_release release;
            return s.commit_scores(request_id, scores.data(), static_cast<int32_t>(rows), measured,
                                   static_cast<int32_t>(stride));
          },
          py::arg("request_id"), py::arg("scores"), py::arg("rewards") = py::none())
      .def(
          "history",
          [](const Scheduler& s, int64_t request_id, int32_t candidate_id) {
            const std::vector<TokenRecord> records = s.history(request_id, candidate_id);
            Array<int32_t> tokens(static_cast<py::ssize_t>(records.size()));
            int32_t* out = tokens.mutable_data();
            for (const TokenRecord& record : records) *out++ = record.token;
            return tokens;
          },
          py::arg("request_id"), py::arg("candidate_id"))
      .def(
          "take_decided",
          [](Scheduler& s, int64_t request_id) {
            const std::vector<int32_t> tokens = s.take_decided(request_id);
            return Array<int32_t>(static_cast<py::ssize_t>(tokens.size()), tokens.data());
          },
          py::arg("request_id"))
      .def("take_finished", &Scheduler::take_finished)
      .def(
          "take_result",
          [](Scheduler& s, int64_t request_id) {
            const SearchResult result = s.take_result(request_id);
            py::list candidates;
            for (const Candidate& c : result.candidates)
              candidates.append(candidate_to_dict(c.history(), c));
            py::dict d;
            d["candidates"] = candidates;
            d["num_selections"] = result.num_selections;
            d["num_blocks_copied"] = result.num_blocks_copied;
            d["peak_blocks"] = result.peak_blocks;
            return d;
          },
          py::arg("request_id"))
      .def_property_readonly("has_unfinished", &Scheduler::has_unfinished)
      .def("stats",
           [](const Scheduler& s) {
             const SchedulerStats stats = s.stats();
             py::dict d;
             d["num_requests_waiting"] = stats.num_requests_waiting;
             d["num_requests_running"] = stats.num_requests_running;
             d["num_blocks"] = stats.num_blocks;
             d["num_blocks_used"] = stats.num_blocks_used;
             d["num_rows"] = stats.num_rows;
             return d;
           })
      .def("check_integrity", &Scheduler::check_integrity);
}

}  // namespace ivg::bindings
