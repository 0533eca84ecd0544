// Python face of the label store: numpy int64 arrays in and out, same API as ReferenceLabelStore.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "coupling/label_store.h"

namespace py = pybind11;

namespace {

using chanprune::LabelStore;
using chanprune::Slots;
using chanprune::SlotsView;
using IntArray = py::array_t<int64_t>;

std::string shape_of(const py::array& array) {
  return py::str(array.attr("shape")).cast<std::string>();
}

// Integer array of any shape as int64; no copy where it is that already.
IntArray as_labels(const py::handle& object) {
  py::array array = py::array::ensure(object);
  if (!array) {
    throw std::invalid_argument("labels should be an integer array, got " +
                                py::repr(py::type::of(object)).cast<std::string>());
  }
  const char kind = array.dtype().kind();
  if (array.size() != 0 && kind != 'i' && kind != 'u') {
    throw std::invalid_argument("labels should be integers, got dtype " +
                                py::str(array.dtype()).cast<std::string>());
  }
  return py::array_t<int64_t, py::array::forcecast>::ensure(array);
}

SlotsView view_of(const py::array& array) {
  const int64_t step = sizeof(int64_t);
  const int64_t* data = static_cast<const int64_t*>(array.data());
  return {data, array.shape(0), array.shape(1), array.strides(0) / step, array.strides(1) / step};
}

// Slots (k, n); a row (n,) counts as one slot.
struct SlotsArg {
  IntArray array;

  SlotsArg(const char* name, const py::handle& object) : array(as_labels(object)) {
    if (array.ndim() == 1) {
      array = array.reshape({py::ssize_t{1}, array.shape(0)});
    }
    if (array.ndim() != 2) {
      throw std::invalid_argument(std::string(name) +
                                  " should be a row (n,) or slots (k, n), got shape " +
                                  shape_of(array));
    }
  }

  SlotsView view() const { return view_of(array); }
};

// Labels of any shape, seen as one row.
struct LabelsArg {
  IntArray array;
  IntArray flat;

  explicit LabelsArg(const py::handle& object)
      : array(as_labels(object)), flat(array.reshape({py::ssize_t{1}, array.size()})) {}

  SlotsView view() const { return view_of(flat); }
};

IntArray to_array(const Slots& slots) {
  IntArray result({slots.rows, slots.cols});
  std::copy(slots.data.begin(), slots.data.end(), result.mutable_data());
  return result;
}

template <class T, class Query>
py::array_t<T> map_labels(LabelStore& store, const py::handle& labels, Query query) {
  const LabelsArg arg(labels);
  const SlotsView view = arg.view();
  store.check(view);
  py::array_t<T> result(
      std::vector<py::ssize_t>(arg.array.shape(), arg.array.shape() + arg.array.ndim()));
  T* out = result.mutable_data();
  for (int64_t i = 0; i < view.cols; ++i) {
    out[i] = (store.*query)(view.at(0, i));
  }
  return result;
}

IntArray resolve(LabelStore& store, const py::handle& slots) {
  const SlotsArg arg("slots", slots);
  const std::optional<Slots> changed = store.resolve(arg.view());
  return changed ? to_array(*changed) : arg.array;
}

IntArray occurrences(LabelStore& store, const py::handle& slots) {
  const auto pairs = store.occurrences(SlotsArg("slots", slots).view());
  IntArray result({static_cast<py::ssize_t>(pairs.size()), py::ssize_t{2}});
  int64_t* out = result.mutable_data();
  for (const auto& [root, index] : pairs) {
    *out++ = root;
    *out++ = index;
  }
  return result;
}

py::tuple signatures(LabelStore& store, const std::vector<py::object>& param_dim_slots) {
  std::vector<SlotsArg> args;
  std::vector<SlotsView> views;
  for (const py::object& slots : param_dim_slots) {
    args.emplace_back("slots", slots);
    views.push_back(args.back().view());
  }
  const auto hashed = store.signatures(views);
  IntArray roots(static_cast<py::ssize_t>(hashed.size()));
  py::array_t<uint64_t> hashes(static_cast<py::ssize_t>(hashed.size()));
  for (size_t i = 0; i < hashed.size(); ++i) {
    roots.mutable_data()[i] = hashed[i].first;
    hashes.mutable_data()[i] = hashed[i].second;
  }
  return py::make_tuple(roots, hashes);
}

std::vector<IntArray> split(LabelStore& store, const py::handle& row,
                            const std::vector<int64_t>& sizes, int32_t reason) {
  const SlotsArg arg("row", row);
  std::vector<IntArray> result;
  for (const Slots& slots : store.split(arg.view(), sizes, reason)) {
    result.push_back(to_array(slots));
  }
  return result;
}

}  // namespace

PYBIND11_MODULE(_coupling, m) {
  m.doc() = "Label store of the coupling analysis; chanprune_ext.analysis.labels documents it.";
  py::register_local_exception_translator([](std::exception_ptr raised) {
    try {
      std::rethrow_exception(raised);
    } catch (const std::invalid_argument& error) {
      const py::object type =
          py::module_::import("chanprune_ext.errors").attr("InvalidArgumentError");
      PyErr_SetString(type.ptr(), error.what());
    }
  });

  py::class_<LabelStore>(m, "LabelStore")
      .def(py::init<int64_t>(), py::arg("capacity") = 1024)
      .def_property_readonly("size", &LabelStore::size)
      .def("fresh", &LabelStore::fresh, py::arg("n"))
      .def(
          "find",
          [](LabelStore& store, const py::object& labels) {
            return map_labels<int64_t>(store, labels, &LabelStore::find);
          },
          py::arg("labels"))
      .def(
          "frozen",
          [](LabelStore& store, const py::object& labels) {
            return map_labels<bool>(store, labels, &LabelStore::frozen);
          },
          py::arg("labels"))
      .def(
          "axis",
          [](LabelStore& store, const py::object& labels) {
            return map_labels<int64_t>(store, labels, &LabelStore::axis);
          },
          py::arg("labels"))
      .def(
          "flags",
          [](LabelStore& store, const py::object& labels) {
            return map_labels<int64_t>(store, labels, &LabelStore::flags);
          },
          py::arg("labels"))
      .def(
          "reason",
          [](LabelStore& store, int64_t label) {
            store.check({&label, 1, 1, 1, 1});
            return store.reason(label);
          },
          py::arg("label"))
      .def(
          "resolve",
          [](LabelStore& store, const py::object& slots) { return resolve(store, slots); },
          py::arg("slots"))
      .def(
          "occurrences",
          [](LabelStore& store, const py::object& slots) { return occurrences(store, slots); },
          py::arg("slots"))
      .def("signatures", &signatures, py::arg("param_dim_slots"))
      .def(
          "freeze",
          [](LabelStore& store, const py::object& labels, int32_t reason) {
            store.freeze(LabelsArg(labels).view(), reason);
          },
          py::arg("labels"), py::arg("reason"))
      .def(
          "set_flag",
          [](LabelStore& store, const py::object& labels, int64_t bit) {
            store.set_flag(LabelsArg(labels).view(), bit);
          },
          py::arg("labels"), py::arg("bit"))
      .def(
          "union",
          [](LabelStore& store, const py::object& a, const py::object& b, int32_t reason) {
            store.unify(LabelsArg(a).view(), LabelsArg(b).view(), reason);
          },
          py::arg("a"), py::arg("b"), py::arg("reason"))
      .def(
          "unify",
          [](LabelStore& store, const py::object& a, const py::object& b, int32_t reason) {
            store.unify(SlotsArg("a", a).view(), SlotsArg("b", b).view(), reason);
          },
          py::arg("a"), py::arg("b"), py::arg("reason"))
      .def(
          "tie",
          [](LabelStore& store, const py::object& labels, int32_t reason) {
            store.tie(SlotsArg("labels", labels).view(), reason);
          },
          py::arg("labels"), py::arg("reason"))
      .def(
          "merge",
          [](LabelStore& store, const py::object& a, const py::object& b) {
            return to_array(store.merge(SlotsArg("a", a).view(), SlotsArg("b", b).view()));
          },
          py::arg("a"), py::arg("b"))
      .def(
          "split",
          [](LabelStore& store, const py::object& row, const std::vector<int64_t>& sizes,
             int32_t reason) { return split(store, row, sizes, reason); },
          py::arg("row"), py::arg("sizes"), py::arg("reason"));
}
