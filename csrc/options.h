// The closed choices of a request. Mirror of python/flashpair/terms.py; keep the order.
#pragma once

namespace flashpair {

enum class Similarity : int { dot, squared_euclidean, euclidean };
enum class Score : int { identity, hinge, softplus, square, squared_hinge, circle, softcap, log_cosh };
enum class Mask : int { all, same, different, given, not_given };
enum class Reduction : int { sum, count, logsumexp, softmax_mean, moments, max };
enum class Axis : int { rows, columns };
enum class Combine : int { add, logaddexp };
enum class Guide : int { none, threshold, weight, logits };

}  // namespace flashpair
