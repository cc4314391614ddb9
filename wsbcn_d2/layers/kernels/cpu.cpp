// BCN and WS on a CPU: forward and backward, every number is fetched from memory once. build.py
// builds this file, once for each type REAL, and cpu.py calls it.
//
// The formulas and their names are those of autograd.py. A row is one channel of
// one sample, or one filter. Sums run in REAL within blocks and in double over blocks; variances
// are of centred values, so a large mean costs no accuracy. A group of channels is one task: its
// moments, its estimates and its output need nothing of other groups.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

using Real = REAL;
constexpr int64_t kBlock = 1024;

// Mean of a row, and the sum of squares around it, put together block by block (Chan et al.).
void moments(const Real* x, int64_t size, double& mean, double& squares) {
  mean = squares = 0;
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t n = std::min(kBlock, size - begin);
    const Real* p = x + begin;
    Real sum = 0, rest = 0, square = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += p[i];
    const Real centre = sum / Real(n);
#pragma omp simd reduction(+ : rest, square)
    for (int64_t i = 0; i < n; ++i) {
      const Real d = p[i] - centre;
      rest += d;
      square += d * d;
    }
    // The centre is rounded: rest says by how much.
    const double delta = double(centre) + double(rest) / n - mean;
    squares += double(square) - double(rest) * double(rest) / n;
    squares += delta * delta * begin * n / (begin + n);
    mean += delta * n / (begin + n);
  }
  if (squares < 0) squares = 0;  // not std::max, which would swallow a NaN
}

// Sums over a row of dy and of dy * (x - mean).
void products(const Real* dy, const Real* x, Real mean, int64_t size, double& s, double& t) {
  s = t = 0;
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t n = std::min(kBlock, size - begin);
    const Real *p = dy + begin, *q = x + begin;
    Real sum = 0, product = 0;
#pragma omp simd reduction(+ : sum, product)
    for (int64_t i = 0; i < n; ++i) {
      sum += p[i];
      product += p[i] * (q[i] - mean);
    }
    s += sum;
    t += product;
  }
}

// y = scale * (x - mean) + shift
void affine(const Real* x, Real* y, Real mean, Real scale, Real shift, int64_t size) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) y[i] = scale * (x[i] - mean) + shift;
}

// dx = scale * (dy - slope * (x - mean) - lost)
void combine(const Real* dy, const Real* x, Real* dx, Real mean, Real slope, Real lost, Real scale,
             int64_t size) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) dx[i] = scale * (dy[i] - slope * (x[i] - mean) - lost);
}

struct Bcn {
  int64_t n, c, groups, size;  // size: numbers in a row
  const Real *x, *weight, *bn_weight, *bn_bias;  // bn_weight, bn_bias: null without an affine
  Real *m, *v;                                   // (n, c): moments of the rows
  Real *mean, *inverse;  // (c): estimates in use; the variance as its inverse deviation
  Real *mu, *r;          // (n, groups): moments of the groups; the variance likewise
  int64_t per_group = c / groups;

  double a(int64_t k) const { return bn_weight ? double(inverse[k]) * bn_weight[k] : inverse[k]; }
  // Mean after the batch half of the channel k of the sample i.
  double e(int64_t i, int64_t k) const {
    return a(k) * (double(m[i * c + k]) - mean[k]) + (bn_bias ? double(bn_bias[k]) : 0.0);
  }
};

void measure(const Bcn& f, int64_t k) {
  for (int64_t i = 0; i < f.n; ++i) {
    double mean, squares;
    moments(f.x + (i * f.c + k) * f.size, f.size, mean, squares);
    f.m[i * f.c + k] = Real(mean);
    f.v[i * f.c + k] = Real(squares / f.size);
  }
}

// One step of the estimates of the channel k towards its batch; false if that is not finite.
bool step(const Bcn& f, int64_t k, bool outright, double rate, Real& mean, Real& var) {
  double batch_mean = 0, batch_var = 0;
  for (int64_t i = 0; i < f.n; ++i) batch_mean += double(f.m[i * f.c + k]) / f.n;
  for (int64_t i = 0; i < f.n; ++i) {
    const double d = f.m[i * f.c + k] - batch_mean;
    batch_var += (f.v[i * f.c + k] + d * d) / f.n;
  }
  const double delta = batch_mean - mean;
  mean = Real(outright ? batch_mean : mean + rate * delta);
  var = Real(outright ? batch_var : var + rate * (batch_var + delta * delta - var));
  return std::isfinite(Real(batch_mean)) && std::isfinite(Real(batch_var));
}

// The output of a group, from the estimates of its channels and the moments of its rows.
void normalize(const Bcn& f, int64_t g, Real* y, const Real* bias, double eps) {
  const int64_t first = g * f.per_group, last = first + f.per_group;
  for (int64_t i = 0; i < f.n; ++i) {
    double mu = 0, variance = 0;
    for (int64_t k = first; k < last; ++k) mu += f.e(i, k) / f.per_group;
    for (int64_t k = first; k < last; ++k) {
      const double d = f.e(i, k) - mu, a = f.a(k);
      variance += (d * d + a * a * f.v[i * f.c + k]) / f.per_group;
    }
    const double r = 1 / std::sqrt(variance + eps), wr = r * f.weight[g];
    f.mu[i * f.groups + g] = Real(mu);
    f.r[i * f.groups + g] = Real(r);
    for (int64_t k = first; k < last; ++k) {
      const int64_t row = i * f.c + k;
      affine(f.x + row * f.size, y + row * f.size, f.m[row], Real(wr * f.a(k)),
             Real(wr * (f.e(i, k) - mu) + bias[g]), f.size);
    }
  }
}

enum Formula { kBiased, kUnbiased, kUnbiasedStd };

}  // namespace

// Writes m, v, mean, inverse, mu, r and y. The estimates bn_mean, bn_var and the count of batches
// move unless count is null.
extern "C" void bcn_forward(int64_t n, int64_t c, int64_t groups, int64_t size, const Real* x,
                            const Real* weight, const Real* bn_weight, const Real* bn_bias,
                            Real* m, Real* v, Real* mean, Real* inverse, Real* mu, Real* r,
                            Real* y, const Real* bias, Real* bn_mean, Real* bn_var,
                            int64_t* count, double bn_eps, double rate, double eps, int threads) {
  const Bcn f{n, c, groups, size, x, weight, bn_weight, bn_bias, m, v, mean, inverse, mu, r};
  std::vector<Real> var(c);
  const bool outright = count && (*count == 0 || rate >= 1);
  const auto use = [&](int64_t g, bool moved) {
    for (int64_t k = g * f.per_group; k < (g + 1) * f.per_group; ++k) {
      if (!moved) mean[k] = bn_mean[k], var[k] = bn_var[k];
      inverse[k] = Real(1 / std::sqrt(double(var[k]) + bn_eps));
    }
    normalize(f, g, y, bias, eps);
  };
  bool finite = true;
#pragma omp parallel for schedule(static) reduction(&& : finite) num_threads(threads)
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t k = g * f.per_group; k < (g + 1) * f.per_group; ++k) {
      measure(f, k);
      mean[k] = bn_mean[k], var[k] = bn_var[k];
      if (count) finite = step(f, k, outright, rate, mean[k], var[k]) && finite;
    }
    use(g, true);
  }
  if (!count) return;
  if (finite) {
    std::copy(mean, mean + c, bn_mean);
    std::copy(var.begin(), var.end(), bn_var);
    ++*count;
  } else {
    // One channel that is not finite keeps the estimates of all.
    for (int64_t g = 0; g < groups; ++g) use(g, false);
  }
}

// dx may be null, and d_bn_weight and d_bn_bias both.
extern "C" void bcn_backward(int64_t n, int64_t c, int64_t groups, int64_t size, const Real* x,
                             const Real* weight, const Real* bn_weight, const Real* bn_bias,
                             Real* m, Real* v, Real* mean, Real* inverse, Real* mu, Real* r,
                             const Real* dy, Real* dx, Real* d_weight, Real* d_bias,
                             Real* d_bn_weight, Real* d_bn_bias, int threads) {
  const Bcn f{n, c, groups, size, x, weight, bn_weight, bn_bias, m, v, mean, inverse, mu, r};
  const double numbers = double(f.per_group) * size;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = g * f.per_group;
    double dw = 0, db = 0;
    // Of each channel: the sums s and t of a sample, and the gradients so far.
    std::vector<double> sums(4 * f.per_group);
    double *s = sums.data(), *t = s + f.per_group, *dbw = t + f.per_group, *dbb = dbw + f.per_group;
    for (int64_t i = 0; i < n; ++i) {
      const double centre = mu[i * groups + g], scale = r[i * groups + g];
      const double wr = scale * weight[g];
      double sum_dy = 0, sum_dy_z = 0;
      for (int64_t j = 0; j < f.per_group; ++j) {
        const int64_t k = first + j, row = i * c + k;
        products(dy + row * size, x + row * size, m[row], size, s[j], t[j]);
        sum_dy += s[j];
        sum_dy_z += scale * (t[j] * f.a(k) + s[j] * (f.e(i, k) - centre));
      }
      db += sum_dy;
      dw += sum_dy_z;
      const double q = sum_dy_z * scale / numbers;
      for (int64_t j = 0; j < f.per_group; ++j) {
        const int64_t k = first + j, row = i * c + k;
        const double slope = q * f.a(k), lost = sum_dy / numbers + q * (f.e(i, k) - centre);
        const double dz = wr * (s[j] - size * lost), dz_x = wr * (t[j] - size * slope * v[row]);
        dbb[j] += dz;
        dbw[j] += dz_x + dz * (double(m[row]) - mean[k]);
        if (dx)
          combine(dy + row * size, x + row * size, dx + row * size, m[row], Real(slope),
                  Real(lost), Real(wr * f.a(k)), size);
      }
    }
    d_weight[g] = Real(dw);
    d_bias[g] = Real(db);
    for (int64_t j = 0; d_bn_weight && j < f.per_group; ++j) {
      d_bn_weight[first + j] = Real(dbw[j] * inverse[first + j]);
      d_bn_bias[first + j] = Real(dbb[j]);
    }
  }
}

// stats holds mean, biased variance and scale u of each of the rows (filters).
extern "C" void ws_forward(int64_t rows, int64_t size, const Real* w, Real* y, Real* stats,
                           int formula, double eps, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < rows; ++i) {
    double mean, squares;
    moments(w + i * size, size, mean, squares);
    const double biased = squares / size, unbiased = squares / (size - 1);
    const double u = formula == kBiased     ? 1 / std::sqrt(biased + eps)
                     : formula == kUnbiased ? 1 / std::sqrt(unbiased + eps)
                                            : 1 / (std::sqrt(unbiased) + eps);
    stats[i] = Real(mean);
    stats[rows + i] = Real(biased);
    stats[2 * rows + i] = Real(u);
    affine(w + i * size, y + i * size, Real(mean), Real(u), Real(0), size);
  }
}

// rounding: the relative error that rounding leaves in the deviation of a constant filter.
extern "C" void ws_backward(int64_t rows, int64_t size, const Real* w, const Real* dy, Real* dw,
                            const Real* stats, int formula, double rounding, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < rows; ++i) {
    const double mean = stats[i], biased = stats[rows + i], u = stats[2 * rows + i];
    double s, t;
    products(dy + i * size, w + i * size, stats[i], size, s, t);
    double slope = u * u * t / (formula == kBiased ? size : size - 1);
    if (formula == kUnbiasedStd) {
      // The deviation of a constant filter, which rounding makes almost 0, has no derivative: 0
      // is the subgradient taken.
      const double deviation = std::sqrt(biased * size / (size - 1));
      const bool constant = deviation <= rounding * std::fabs(mean) + 1e-9;
      slope = constant ? 0 : u * t / ((size - 1) * deviation);
    }
    combine(dy + i * size, w + i * size, dw + i * size, stats[i], Real(slope), Real(s / size),
            Real(u), size);
  }
}
