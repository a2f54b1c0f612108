// Stands in for libcudss.so.1 in tests without a GPU: the C interface of cuDSS 1.0 as far as spcache uses it, on host
// pointers, with dense matrices. It tests order of calls, slots, errors and memory; it says nothing of cuDSS's numbers.
//
// Statuses that cuDSS gives without a GPU are the same here (test_cudss_library.py compares both). Elsewhere this is
// the stricter one: what cuDSS leaves undefined (dead objects, overwritten patterns, entries twice, wrong sizes) is
// refused. Objects are numbers that are never used again: a dead one is found out, and nothing is read through it.
#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cmath>
#include <complex>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

enum Status { SUCCESS, NOT_INITIALIZED, ALLOC_FAILED, INVALID_VALUE, NOT_SUPPORTED, EXECUTION_FAILED, INTERNAL_ERROR };
enum Type { R_32F = 0, R_64F = 1, C_32F = 4, C_64F = 5, R_32I = 10, R_64I = 24 };
enum Mtype { GENERAL, SYMMETRIC, HERMITIAN, SPD, HPD };
enum View { FULL, LOWER, UPPER };
enum Phase { REORDERING = 1, SYMBOLIC = 2, FACTORIZATION = 4, REFACTORIZATION = 8, REFINEMENT = 512, SOLVE = 1008 };
enum Setting { SOLVE_MODE = 4, IR_N_STEPS, IR_TOL, PIVOT_TYPE, PIVOT_THRESHOLD, PIVOT_EPSILON, HOST_NTHREADS = 14,
               DETERMINISTIC_MODE = 24 };
enum Parameter { INFO, LU_NNZ, NPIVOTS, INERTIA, PERM_REORDER_ROW, PERM_REORDER_COL, USER_PERM = 9 };
constexpr int SETTINGS = 30;  // cuDSS 1.0 has so many

// Those that cannot change what is computed, and their defaults; the others are refused.
const std::map<int, double> KNOWN = {{0, 0}, {1, 0}, {2, 0}, {3, 6}, {4, 0}, {5, 0}, {6, 0}, {7, 0}, {8, 1}, {9, -1},
                                     {14, -1}, {16, 0}, {24, 0}};

// --- Counters, and failures on request ------------------------------------------------------------------------------

enum Count { ANALYSES, SYMBOLICS, FACTORIZATIONS, REFACTORIZATIONS, SOLVES, COLUMNS, HANDLES, CONFIGS, DATA, MATRICES,
             MISUSES, COLLISIONS, BYTES, SET_VALUES, INFO_READS, STREAM, COUNTS };
std::atomic<int64_t> counts[COUNTS];

std::mutex tables;  // over everything from here to `Handle`
auto& requested = *new std::map<std::string, int>;  // never destroyed: objects may die after main

std::optional<int> request(const char* function) {
  std::lock_guard guard(tables);
  const auto found = requested.find(function);
  if (found == requested.end()) return {};
  const int status = found->second;
  requested.erase(found);
  return status;
}

#define FAIL_ON_REQUEST \
  if (const auto status = request(__func__)) return *status

// --- Objects --------------------------------------------------------------------------------------------------------

struct MemoryHandler {  // cudssDeviceMemHandler_t
  void* context;
  int (*allocate)(void* context, void** pointer, size_t size, void* stream);
  int (*release)(void* context, void* pointer, size_t size, void* stream);
  char name[64];
};

struct Handle {
  static constexpr Count count = HANDLES;
  std::atomic<int> inside{0};  // threads in functions of this handle
  std::mutex mutex;
  bool alive = true;  // under mutex
  MemoryHandler memory{};
  void* stream = nullptr;
};

struct Config {
  static constexpr Count count = CONFIGS;
  std::array<double, SETTINGS> value{};
};

struct Matrix {
  static constexpr Count count = MATRICES;
  bool sparse = false;
  int64_t rows = 0, columns = 0, nnz = 0, ld = 0;
  const int32_t *indptr = nullptr, *indices = nullptr;  // [rows + 1], [nnz]
  const void* values = nullptr;                         // [nnz], or columns of stride ld
  int type = 0, mtype = 0, view = 0, base = 0, layout = 0;
};

struct Block {  // the factor: n * n numbers by columns, n rows
  void* pointer = nullptr;
  size_t size = 0;
  MemoryHandler memory{};  // which it came from
};

struct Data {
  static constexpr Count count = DATA;
  void* handle = nullptr;  // data belong to the handle that made them
  Matrix A;                // as it was analyzed; its values are not looked at
  std::vector<int32_t> indptr, indices, user_perm, perm;
  bool reordered = false, analyzed = false, factorized = false;
  Block factor;
  int info = 0, npivots = 0, inertia[2] = {0, 0};
};

template <class T>
auto& live = *new std::map<uintptr_t, std::shared_ptr<T>>;

template <class T>
int add(std::shared_ptr<T> object, void** out) {
  static_assert(sizeof(uintptr_t) == 8, "numbers would run out");
  static uintptr_t next;  // of each type another range: a matrix is never taken for a config
  std::lock_guard guard(tables);
  const uintptr_t name = 0x1000 + (uintptr_t(T::count) << 56) + 16 * next++;
  live<T>[name] = std::move(object);
  ++counts[T::count];
  *out = reinterpret_cast<void*>(name);
  return SUCCESS;
}

template <class T>
std::shared_ptr<T> find(void* name) {
  std::lock_guard guard(tables);
  const auto found = live<T>.find(reinterpret_cast<uintptr_t>(name));
  if (found != live<T>.end()) return found->second;
  ++counts[MISUSES];
  return nullptr;
}

// A matrix or config as it is now: other threads may set its values.
template <class T>
std::optional<T> copy(void* name) {
  const auto object = find<T>(name);
  if (!object) return {};
  std::lock_guard guard(tables);
  return *object;
}

template <class T>
int remove(void* name) {
  if (!find<T>(name)) return INVALID_VALUE;
  std::lock_guard guard(tables);
  counts[T::count] -= live<T>.erase(reinterpret_cast<uintptr_t>(name));
  return SUCCESS;
}

// A function of a handle: a second thread that comes in is counted, and has to wait.
class Entered {
 public:
  explicit Entered(void* name) : handle_(find<Handle>(name)) {
    if (!handle_) return;
    if (handle_->inside++) ++counts[COLLISIONS];
    lock_ = std::unique_lock(handle_->mutex);
    alive_ = handle_->alive;
    if (!alive_) ++counts[MISUSES];
  }
  ~Entered() {
    if (handle_) --handle_->inside;
  }
  explicit operator bool() const { return alive_; }
  Handle* operator->() const { return handle_.get(); }

 private:
  std::shared_ptr<Handle> handle_;
  std::unique_lock<std::mutex> lock_;
  bool alive_ = false;
};

int misuse() {
  ++counts[MISUSES];
  return INVALID_VALUE;
}

// --- Memory ---------------------------------------------------------------------------------------------------------

int allocate(const Entered& handle, size_t size, Block* out) {
  void* pointer = nullptr;
  if (handle->memory.allocate) {
    if (handle->memory.allocate(handle->memory.context, &pointer, size, handle->stream)) return ALLOC_FAILED;
  } else {
    pointer = malloc(size);
  }
  if (!pointer) return ALLOC_FAILED;
  *out = {pointer, size, handle->memory};
  counts[BYTES] += size;
  return SUCCESS;
}

int release(const Entered& handle, Block* block) {
  if (!block->pointer) return SUCCESS;
  memset(block->pointer, 0xff, block->size);  // NaN, for whoever still reads it
  int status = 0;
  if (block->memory.release) {
    status = block->memory.release(block->memory.context, block->pointer, block->size, handle->stream);
  } else {
    free(block->pointer);
  }
  counts[BYTES] -= block->size;
  *block = {};
  return status ? EXECUTION_FAILED : SUCCESS;
}

// --- Dense numerics: matrices by columns, A[i + j * n] --------------------------------------------------------------

template <class T>
constexpr bool is_complex = !std::is_floating_point_v<T>;

template <class T>
T conjugate(T a) {
  if constexpr (is_complex<T>) return std::conj(a);
  else return a;
}

// mtype and view say what the entries stand for; of a triangle, entries beyond it are not looked at.
template <class T>
std::vector<T> dense(const Data& data, const T* values) {
  const int64_t n = data.A.rows;
  const bool hermitian = data.A.mtype == HERMITIAN || data.A.mtype == HPD;
  std::vector<T> A(n * n);
  for (int64_t i = 0; i < n; i++) {
    for (int64_t k = data.indptr[i]; k < data.indptr[i + 1]; k++) {
      const int64_t j = data.indices[k];
      if ((data.A.view == LOWER && i < j) || (data.A.view == UPPER && i > j)) continue;
      A[i + j * n] = hermitian && i == j ? T(std::real(values[k])) : values[k];
      if (data.A.view != FULL && i != j) A[j + i * n] = hermitian ? conjugate(values[k]) : values[k];
    }
  }
  return A;
}

// A = L Lᴴ; returns 0, or 1 + the column of the first pivot that is not positive.
template <class T>
int64_t cholesky(int64_t n, T* A) {
  for (int64_t j = 0; j < n; j++) {
    const auto pivot = std::real(A[j + j * n]);
    if (!(pivot > 0)) return 1 + j;
    for (int64_t i = j; i < n; i++) A[i + j * n] /= std::sqrt(pivot);
    for (int64_t k = j + 1; k < n; k++) {
      for (int64_t i = k; i < n; i++) A[i + k * n] -= A[i + j * n] * conjugate(A[k + j * n]);
    }
  }
  return 0;
}

// A[rows] = L U, diag(L) = 1; returns how many pivots were below epsilon, and so made.
template <class T>
int lu(int64_t n, T* A, int32_t* rows, double epsilon) {
  int made = 0;
  for (int64_t i = 0; i < n; i++) rows[i] = int32_t(i);
  for (int64_t k = 0; k < n; k++) {
    int64_t best = k;
    for (int64_t i = k; i < n; i++) {
      if (std::abs(A[i + k * n]) > std::abs(A[best + k * n])) best = i;
    }
    std::swap(rows[k], rows[best]);
    for (int64_t j = 0; best != k && j < n; j++) std::swap(A[k + j * n], A[best + j * n]);
    T& pivot = A[k + k * n];
    const auto modulus = std::abs(pivot);
    if (modulus < epsilon) pivot = modulus > 0 ? pivot * T(epsilon / modulus) : T(epsilon), made++;
    for (int64_t i = k + 1; i < n; i++) A[i + k * n] /= pivot;
    for (int64_t j = k + 1; j < n; j++) {
      for (int64_t i = k + 1; i < n; i++) A[i + j * n] -= A[i + k * n] * A[k + j * n];
    }
  }
  return made;
}

// Positive and negative eigenvalues of A = Aᴴ: as many as D has in P A Pᵀ = L D Lᴴ (Bunch and Parlett).
template <class T>
void inertia(int64_t n, std::vector<T> A, int* out) {
  const auto at = [&](int64_t i, int64_t j) -> T& { return A[i + j * n]; };
  const auto exchange = [&](int64_t p, int64_t q) {
    for (int64_t i = 0; p != q && i < n; i++) std::swap(at(i, p), at(i, q));
    for (int64_t i = 0; p != q && i < n; i++) std::swap(at(p, i), at(q, i));
  };
  out[0] = out[1] = 0;
  for (int64_t k = 0; k < n;) {
    int64_t d = k, row = k, column = k;  // of the largest entries on and below the diagonal
    for (int64_t j = k; j < n; j++) {
      if (std::abs(at(j, j)) > std::abs(at(d, d))) d = j;
      for (int64_t i = j + 1; i < n; i++) {
        if (row == column || std::abs(at(i, j)) > std::abs(at(row, column))) row = i, column = j;
      }
    }
    const double most = row == column ? 0 : std::abs(at(row, column));
    if (std::abs(at(d, d)) >= 0.64 * most) {
      exchange(k, d);
      const auto pivot = std::real(at(k, k));
      if (pivot == 0) return;
      ++out[pivot < 0];
      for (int64_t j = k + 1; j < n; j++) {
        for (int64_t i = k + 1; i < n; i++) at(i, j) -= at(i, k) * conjugate(at(j, k)) / T(pivot);
      }
      k++;
    } else if (most > 0) {  // a block of negative determinant: one of each sign
      exchange(k, column);
      exchange(k + 1, row);
      ++out[0], ++out[1];
      const T a = at(k, k), b = at(k + 1, k + 1), c = at(k + 1, k), determinant = a * b - c * conjugate(c);
      for (int64_t j = k + 2; j < n; j++) {
        const T y = conjugate(at(j, k)), z = conjugate(at(j, k + 1));
        const T p = (b * y - conjugate(c) * z) / determinant, q = (a * z - c * y) / determinant;
        for (int64_t i = k + 2; i < n; i++) at(i, j) -= at(i, k) * p + at(i, k + 1) * q;
      }
      k += 2;
    } else {
      return;  // NaN
    }
  }
}

// x with T x = x: T is a triangle of A, or of its transpose, then conjugated if asked for.
template <class T>
void triangular(int64_t n, const T* A, T* x, bool lower, bool transposed, bool conjugated, bool unit) {
  const bool forward = lower != transposed;
  for (int64_t s = 0; s < n; s++) {
    const int64_t i = forward ? s : n - 1 - s;
    for (int64_t j = forward ? 0 : i + 1; j < (forward ? i : n); j++) {
      const T a = transposed ? A[j + i * n] : A[i + j * n];
      x[i] -= (conjugated ? conjugate(a) : a) * x[j];
    }
    if (!unit) x[i] /= conjugated ? conjugate(A[i + i * n]) : A[i + i * n];
  }
}

// op(A) x = b for one column; mode 0: A, 1: Aᵀ, 2: Aᴴ.
template <class T>
void solve(const Data& data, int mode, const T* b, T* out) {
  const int64_t n = data.A.rows;
  const T* F = static_cast<const T*>(data.factor.pointer);
  const auto* rows = reinterpret_cast<const int32_t*>(F + n * n);
  std::vector<T> x(b, b + n);
  if (data.A.mtype == SPD || data.A.mtype == HPD) {  // Aᵀ = conj(A) = conj(L) Lᵀ, Aᴴ = A = L Lᴴ
    triangular(n, F, x.data(), true, false, mode == 1, false);
    triangular(n, F, x.data(), true, true, mode != 1, false);
    std::copy(x.begin(), x.end(), out);
  } else if (mode == 0) {
    for (int64_t i = 0; i < n; i++) x[i] = b[rows[i]];
    triangular(n, F, x.data(), true, false, false, true);
    triangular(n, F, x.data(), false, false, false, false);
    std::copy(x.begin(), x.end(), out);
  } else {  // A[rows]ᵀ = Uᵀ Lᵀ
    triangular(n, F, x.data(), false, true, mode == 2, false);
    triangular(n, F, x.data(), true, true, mode == 2, true);
    for (int64_t i = 0; i < n; i++) out[rows[i]] = x[i];
  }
}

// --- Phases ---------------------------------------------------------------------------------------------------------

bool valid_structure(const Matrix& A) {
  if (!A.sparse || A.rows < 1 || A.rows != A.columns || A.nnz < 1 || !A.indptr || !A.indices || A.base) return false;
  if (A.mtype < GENERAL || A.mtype > HPD || A.view < FULL || A.view > UPPER) return false;
  if (A.mtype == GENERAL && A.view != FULL) return false;
  if (A.indptr[0] != 0 || A.indptr[A.rows] != A.nnz) return false;
  std::vector<int64_t> row(A.rows, -1);  // in which a column was met last
  for (int64_t i = 0; i < A.rows; i++) {
    if (A.indptr[i] > A.indptr[i + 1]) return false;
    for (int64_t k = A.indptr[i]; k < A.indptr[i + 1]; k++) {
      const int64_t j = A.indices[k];
      if (j < 0 || j >= A.rows || row[j] == i) return false;
      row[j] = i;
    }
  }
  return true;
}

bool same_structure(const Matrix& A, const Matrix& B) {
  return A.rows == B.rows && A.columns == B.columns && A.nnz == B.nnz && A.indptr == B.indptr &&
         A.indices == B.indices && A.type == B.type && A.mtype == B.mtype && A.view == B.view && A.base == B.base;
}

bool valid_columns(const Matrix& A, const Matrix& b) {
  return !b.sparse && b.rows == A.rows && b.columns >= 1 && b.ld >= A.rows && b.values && b.type == A.type && !b.layout;
}

struct Call {
  Config config;
  Matrix A, x, b;
  int phase;
};

// Everything that can be refused is, before anything is done.
int validate(const Call& call, const Data& data) {
  const int phase = call.phase, solving = phase & SOLVE;
  constexpr int numeric = FACTORIZATION | REFACTORIZATION;
  if (phase <= 0 || phase & ~(REORDERING | SYMBOLIC | numeric | SOLVE)) return INVALID_VALUE;
  if ((phase & numeric) == numeric) return INVALID_VALUE;
  if (solving && solving != SOLVE && solving != SOLVE - REFINEMENT) return NOT_SUPPORTED;
  if (phase & REORDERING) {
    if (!valid_structure(call.A)) return INVALID_VALUE;
    if (call.A.mtype == SPD && call.A.type >= C_32F) return NOT_SUPPORTED;
    if (!data.user_perm.empty() && int64_t(data.user_perm.size()) != call.A.rows) return INVALID_VALUE;
  } else if (!data.reordered || !same_structure(call.A, data.A)) {
    return INVALID_VALUE;
  }
  const bool analyzed = phase & SYMBOLIC || (data.analyzed && !(phase & REORDERING));
  const bool factorized = phase & FACTORIZATION || (data.factorized && !(phase & (REORDERING | SYMBOLIC)));
  if ((phase & numeric && !analyzed) || (phase & (REFACTORIZATION | SOLVE) && !factorized)) return INVALID_VALUE;
  if (phase & numeric) {
    if (!call.A.values) return INVALID_VALUE;
    // cuDSS may read the pattern again: it has to be there still.
    if (!(phase & REORDERING) && (memcmp(call.A.indptr, data.indptr.data(), 4 * data.indptr.size()) ||
                                  memcmp(call.A.indices, data.indices.data(), 4 * data.indices.size()))) {
      return misuse();
    }
  }
  if (!solving) return SUCCESS;
  const double mode = call.config.value[SOLVE_MODE];
  if (mode < 0 || mode > 2) return INVALID_VALUE;
  if (!valid_columns(call.A, call.b) || !valid_columns(call.A, call.x)) return INVALID_VALUE;
  if (call.b.columns != call.x.columns || call.b.values == call.x.values) return INVALID_VALUE;
  return call.config.value[DETERMINISTIC_MODE] && call.b.columns > 1 ? NOT_SUPPORTED : SUCCESS;
}

template <class T>
int factorize(const Entered& handle, const Call& call, Data* data) {
  const int64_t n = data->A.rows, numbers = n * n;
  if (!data->factor.pointer) {
    if (int status = allocate(handle, numbers * sizeof(T) + n * sizeof(int32_t), &data->factor)) return status;
  }
  const std::vector<T> A = dense(*data, static_cast<const T*>(call.A.values));
  T* F = static_cast<T*>(data->factor.pointer);
  std::copy(A.begin(), A.end(), F);
  data->npivots = data->inertia[0] = data->inertia[1] = 0;
  data->factorized = true;
  if (data->A.mtype == SPD || data->A.mtype == HPD) {
    const int64_t failed = cholesky(n, F);
    data->inertia[0] = int(failed ? failed - 1 : n);
    if (!failed) return SUCCESS;
    std::fill(F, F + numbers, std::numeric_limits<decltype(std::abs(T()))>::quiet_NaN());
    if (!data->info) data->info = int(failed);  // until it is set to 0
    return SUCCESS;
  }
  const double given = call.config.value[PIVOT_EPSILON], usual = sizeof(std::abs(T())) == 4 ? 1e-5 : 1e-13;
  data->npivots = lu(n, F, reinterpret_cast<int32_t*>(F + numbers), given < 0 ? usual : given);
  if (data->A.mtype != GENERAL) inertia(n, A, data->inertia);
  return SUCCESS;
}

template <class T>
int run(const Entered& handle, const Call& call, Data* data) {
  if (call.phase & REORDERING) {
    if (int status = release(handle, &data->factor)) return status;
    data->A = call.A;
    data->indptr.assign(call.A.indptr, call.A.indptr + call.A.rows + 1);
    data->indices.assign(call.A.indices, call.A.indices + call.A.nnz);
    data->perm = data->user_perm;
    for (int64_t i = 0; data->user_perm.empty() && i < call.A.rows; i++) data->perm.push_back(int32_t(i));
    data->reordered = true, data->analyzed = data->factorized = false;
    ++counts[ANALYSES];
  }
  if (call.phase & SYMBOLIC) data->analyzed = true, data->factorized = false, ++counts[SYMBOLICS];
  if (call.phase & (FACTORIZATION | REFACTORIZATION)) {
    if (int status = factorize<T>(handle, call, data)) return status;
    ++counts[call.phase & FACTORIZATION ? FACTORIZATIONS : REFACTORIZATIONS];
  }
  if (call.phase & SOLVE) {
    const T* b = static_cast<const T*>(call.b.values);
    T* x = static_cast<T*>(const_cast<void*>(call.x.values));
    for (int64_t k = 0; k < call.b.columns; k++) {
      solve(*data, int(call.config.value[SOLVE_MODE]), b + k * call.b.ld, x + k * call.x.ld);
    }
    ++counts[SOLVES];
    counts[COLUMNS] += call.b.columns;
  }
  return SUCCESS;
}

}  // namespace

// --- The interface --------------------------------------------------------------------------------------------------

extern "C" {

void fakecudss_counters(int64_t* out) {  // [COUNTS]
  for (int k = 0; k < COUNTS; k++) out[k] = counts[k];
}

void fakecudss_reset() {  // leaves the numbers of what is alive
  for (int k = 0; k < COUNTS; k++) {
    if (k != HANDLES && k != CONFIGS && k != DATA && k != MATRICES && k != BYTES) counts[k] = 0;
  }
  std::lock_guard guard(tables);
  requested.clear();
}

void fakecudss_fail_next(const char* function, int status) {
  std::lock_guard guard(tables);
  requested[function] = status;
}

int cudssGetProperty(int property, int* value) {
  FAIL_ON_REQUEST;
  if (!value) return INVALID_VALUE;
  if (property < 0 || property > 2) return NOT_SUPPORTED;
  int version[3] = {1, 0, 0};
  if (const char* given = getenv("FAKECUDSS_VERSION")) {
    if (sscanf(given, "%d.%d.%d", &version[0], &version[1], &version[2]) != 3) return INTERNAL_ERROR;
  }
  *value = version[property];
  return SUCCESS;
}

int cudssCreate(void** handle) {
  FAIL_ON_REQUEST;
  return handle ? add(std::make_shared<Handle>(), handle) : INVALID_VALUE;
}

int cudssDestroy(void* handle) {  // what other objects it has made stay alive, and cannot be used any more
  FAIL_ON_REQUEST;
  const Entered inside(handle);
  if (!inside) return INVALID_VALUE;
  inside->alive = false;
  return remove<Handle>(handle);
}

int cudssSetStream(void* handle, void* stream) {
  FAIL_ON_REQUEST;
  const Entered inside(handle);
  if (!inside) return INVALID_VALUE;
  inside->stream = stream;
  counts[STREAM] = reinterpret_cast<intptr_t>(stream);
  return SUCCESS;
}

int cudssSetDeviceMemHandler(void* handle, const MemoryHandler* memory) {
  FAIL_ON_REQUEST;
  const Entered inside(handle);
  if (!inside || (memory && (!memory->allocate || !memory->release))) return INVALID_VALUE;
  inside->memory = memory ? *memory : MemoryHandler{};
  return SUCCESS;
}

int cudssConfigCreate(void** config) {
  FAIL_ON_REQUEST;
  if (!config) return INVALID_VALUE;
  auto made = std::make_shared<Config>();
  for (const auto& [setting, value] : KNOWN) made->value[setting] = value;
  return add(std::move(made), config);
}

int cudssConfigDestroy(void* config) {
  FAIL_ON_REQUEST;
  return remove<Config>(config);
}

int cudssConfigSet(void* config, int setting, const void* value, size_t size) {
  FAIL_ON_REQUEST;
  const auto object = find<Config>(config);
  if (!object || !value) return INVALID_VALUE;
  if (setting < 0 || setting >= SETTINGS) return INTERNAL_ERROR;
  if (!KNOWN.count(setting)) return NOT_SUPPORTED;
  const bool real = setting == IR_TOL || setting == PIVOT_THRESHOLD || setting == PIVOT_EPSILON;
  if (size != 4 && !(real && size == 8)) return INVALID_VALUE;
  double number;
  if (!real) number = *static_cast<const int*>(value);
  else number = size == 4 ? *static_cast<const float*>(value) : *static_cast<const double*>(value);
  if (setting == PIVOT_TYPE && (number < 0 || number > 6)) return INVALID_VALUE;
  std::lock_guard guard(tables);
  object->value[setting] = number;  // cuDSS keeps what it then refuses
  if (setting == SOLVE_MODE && (number < 0 || number > 2)) return NOT_SUPPORTED;
  if ((setting == IR_N_STEPS || setting == IR_TOL || setting == HOST_NTHREADS) && !(number >= 0)) return INVALID_VALUE;
  return SUCCESS;
}

int cudssDataCreate(void* handle, void** data) {
  FAIL_ON_REQUEST;
  const Entered inside(handle);
  if (!inside || !data) return INVALID_VALUE;
  auto made = std::make_shared<Data>();
  made->handle = handle;
  return add(std::move(made), data);
}

int cudssDataDestroy(void* handle, void* data) {
  FAIL_ON_REQUEST;
  const Entered inside(handle);
  if (!inside) return INVALID_VALUE;
  const auto object = find<Data>(data);
  if (!object) return INVALID_VALUE;
  if (object->handle != handle) return misuse();
  remove<Data>(data);
  return release(inside, &object->factor);
}

int cudssDataSet(void* handle, void* data, int parameter, const void* value, size_t size) {
  FAIL_ON_REQUEST;
  const Entered inside(handle);
  if (!inside) return INVALID_VALUE;
  const auto object = find<Data>(data);
  if (!object || !value) return INVALID_VALUE;
  if (object->handle != handle) return misuse();
  const auto* numbers = static_cast<const int32_t*>(value);
  if (parameter == INFO) {
    if (size != sizeof(int)) return INVALID_VALUE;
    object->info = numbers[0];
  } else if (parameter == USER_PERM) {  // of effect at the next reordering
    const int64_t n = size / sizeof(int32_t);
    if (n < 1 || size % sizeof(int32_t)) return INVALID_VALUE;
    std::vector<bool> met(n);
    for (int64_t i = 0; i < n; i++) {
      if (numbers[i] < 0 || numbers[i] >= n || met[numbers[i]]) return INVALID_VALUE;
      met[numbers[i]] = true;
    }
    object->user_perm.assign(numbers, numbers + n);
  } else {
    return NOT_SUPPORTED;
  }
  return SUCCESS;
}

int cudssDataGet(void* handle, void* data, int parameter, void* value, size_t size, size_t* written) {
  FAIL_ON_REQUEST;
  const Entered inside(handle);
  if (!inside) return INVALID_VALUE;
  const auto object = find<Data>(data);
  if (!object || !value) return INVALID_VALUE;
  if (object->handle != handle) return misuse();
  const auto give = [&](bool known, const void* from, size_t bytes) -> int {
    if (!known || size < bytes) return INVALID_VALUE;
    memcpy(value, from, bytes);
    if (written) *written = bytes;
    return SUCCESS;
  };
  const Data& d = *object;
  const int64_t lu_nnz = d.A.rows * d.A.rows;
  switch (parameter) {
    case INFO:
      ++counts[INFO_READS];
      return give(true, &d.info, sizeof d.info);
    case LU_NNZ:
      return give(d.analyzed, &lu_nnz, sizeof lu_nnz);
    case NPIVOTS:
      return give(d.factorized, &d.npivots, sizeof d.npivots);
    case INERTIA:  // signs of eigenvalues: of real ones only
      if (d.A.mtype == GENERAL || (d.A.mtype == SYMMETRIC && d.A.type >= C_32F)) return NOT_SUPPORTED;
      return give(d.factorized, d.inertia, sizeof d.inertia);
    case PERM_REORDER_ROW:
    case PERM_REORDER_COL:
      return give(d.reordered, d.perm.data(), sizeof(int32_t) * d.perm.size());
    case USER_PERM:
      return give(!d.user_perm.empty(), d.user_perm.data(), sizeof(int32_t) * d.user_perm.size());
  }
  return NOT_SUPPORTED;
}

int cudssMatrixCreateCsr(void** matrix, int64_t rows, int64_t columns, int64_t nnz, const void* indptr,
                         const void* indptr_end, const void* indices, const void* values, int offset_type,
                         int index_type, int type, int mtype, int view, int base) {
  FAIL_ON_REQUEST;
  if (!matrix || rows < 0 || columns < 0) return INVALID_VALUE;
  if (type != R_32F && type != R_64F && type != C_32F && type != C_64F) return INVALID_VALUE;
  if (offset_type == R_64I) return NOT_SUPPORTED;  // cuDSS does
  if (offset_type != R_32I || index_type != R_32I) return INVALID_VALUE;
  if (indptr_end) return NOT_SUPPORTED;
  auto made = std::make_shared<Matrix>();
  made->sparse = true;
  made->rows = rows, made->columns = columns, made->nnz = nnz;
  made->indptr = static_cast<const int32_t*>(indptr), made->indices = static_cast<const int32_t*>(indices);
  made->values = values;
  made->type = type, made->mtype = mtype, made->view = view, made->base = base;
  return add(std::move(made), matrix);
}

int cudssMatrixCreateDn(void** matrix, int64_t rows, int64_t columns, int64_t ld, const void* values, int type,
                        int layout) {
  FAIL_ON_REQUEST;
  if (!matrix || rows < 0 || columns < 0) return INVALID_VALUE;
  if (type != R_32F && type != R_64F && type != C_32F && type != C_64F) return INVALID_VALUE;
  if (layout == 1) return NOT_SUPPORTED;
  auto made = std::make_shared<Matrix>();
  made->rows = rows, made->columns = columns, made->ld = ld, made->values = values;
  made->type = type, made->layout = layout;
  return add(std::move(made), matrix);
}

int cudssMatrixSetValues(void* matrix, const void* values) {
  FAIL_ON_REQUEST;
  const auto object = find<Matrix>(matrix);
  if (!object || !values) return INVALID_VALUE;
  std::lock_guard guard(tables);
  object->values = values;
  ++counts[SET_VALUES];
  return SUCCESS;
}

int cudssMatrixDestroy(void* matrix) {
  FAIL_ON_REQUEST;
  return remove<Matrix>(matrix);
}

int cudssExecute(void* handle, int phase, void* config, void* data, void* A, void* x, void* b) {
  FAIL_ON_REQUEST;
  const Entered inside(handle);
  if (!inside) return INVALID_VALUE;
  if (const char* microseconds = getenv("FAKECUDSS_SLEEP_US")) {
    std::this_thread::sleep_for(std::chrono::microseconds(atoi(microseconds)));
  }
  const auto settings = copy<Config>(config);
  const auto object = find<Data>(data);
  const auto sparse = copy<Matrix>(A);
  // Only a solve needs columns; what is given must be alive.
  const bool solving = phase & SOLVE;
  const auto solution = x || solving ? copy<Matrix>(x) : Matrix{}, rhs = b || solving ? copy<Matrix>(b) : Matrix{};
  if (!settings || !object || !sparse || !solution || !rhs) return INVALID_VALUE;
  if (object->handle != handle) return misuse();
  counts[STREAM] = reinterpret_cast<intptr_t>(inside->stream);
  const Call call{*settings, *sparse, *solution, *rhs, phase};
  if (int status = validate(call, *object)) return status;
  switch (call.A.type) {
    case R_32F: return run<float>(inside, call, object.get());
    case R_64F: return run<double>(inside, call, object.get());
    case C_32F: return run<std::complex<float>>(inside, call, object.get());
    default: return run<std::complex<double>>(inside, call, object.get());
  }
}

}  // extern "C"
