// The compiled half of index_builder.py: the same two walks, the same results, and no others.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace py = pybind11;

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

// Row i: (position in doc_idx, offset) of token i * seq_length in the concatenated documents.
Array<std::int32_t> sample_index(const Array<std::int32_t>& lengths, const Array<std::int32_t>& doc_idx,
                                 std::int64_t seq_length, std::int64_t num_samples) {
    if (seq_length < 1 || num_samples < 0) throw std::invalid_argument("seq_length or num_samples is too small");
    Array<std::int32_t> result({num_samples + 1, std::int64_t{2}});
    std::int32_t* row = result.mutable_data();
    const std::int32_t* tokens_in = lengths.data();
    const std::int32_t* order = doc_idx.data();
    const std::int64_t num_lengths = lengths.size();
    const std::int64_t num_documents = doc_idx.size();

    py::gil_scoped_release release;
    std::int64_t position = 0;
    std::int64_t start = 0;  // first token of the document at `position`
    const auto length = [&]() -> std::int64_t {
        if (position >= num_documents) throw std::invalid_argument("the documents hold too few tokens");
        if (order[position] < 0 || order[position] >= num_lengths) throw std::out_of_range("document id");
        return tokens_in[order[position]];
    };
    for (std::int64_t i = 0; i <= num_samples; ++i) {
        const std::int64_t token = i * seq_length;
        while (start + length() <= token) start += length(), ++position;
        *row++ = static_cast<std::int32_t>(i == 0 ? 0 : position);
        *row++ = static_cast<std::int32_t>(token - start);
    }
    return result;
}

// Greedy order: the dataset that lags most behind its share, the first of equals.
py::tuple blend(const Array<double>& weights, std::int64_t size) {
    if (size < 0 || weights.size() < 1 || weights.size() > INT16_MAX) throw std::invalid_argument("blend size");
    Array<std::int16_t> dataset_index(size);
    Array<std::int64_t> sample_index(size);
    std::int16_t* dataset = dataset_index.mutable_data();
    std::int64_t* sample = sample_index.mutable_data();
    const double* weight = weights.data();
    const std::int64_t num_datasets = weights.size();
    {
        py::gil_scoped_release release;
        std::vector<std::int64_t> counts(num_datasets, 0);
        for (std::int64_t i = 0; i < size; ++i) {
            const double drawn = static_cast<double>(std::max<std::int64_t>(i, 1));
            std::int64_t chosen = 0;
            double most = weight[0] * drawn - static_cast<double>(counts[0]);
            for (std::int64_t d = 1; d < num_datasets; ++d) {
                const double lag = weight[d] * drawn - static_cast<double>(counts[d]);
                if (lag > most) most = lag, chosen = d;
            }
            dataset[i] = static_cast<std::int16_t>(chosen);
            sample[i] = counts[chosen]++;
        }
    }
    return py::make_tuple(dataset_index, sample_index);
}

PYBIND11_MODULE(_index_builder, module) {
    module.doc() = "Compiled index building; use megatron.data.index_builder.";
    module.def("sample_index", &sample_index, py::arg("lengths").noconvert(), py::arg("doc_idx").noconvert(),
               py::arg("seq_length"), py::arg("num_samples"));
    module.def("blend", &blend, py::arg("weights").noconvert(), py::arg("size"));
}
