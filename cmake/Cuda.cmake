# The CUDA backend, where it is wanted: src/kernels/cuda/*.cu for every architecture of
# MOETUNE_CUDA_ARCHS, and sm90/*.cu for sm_90a alone. A program built so still runs without a GPU.
if(MOETUNE_CUDA MATCHES "^(AUTO|NVCC)$")
  find_program(NVCC nvcc HINTS /usr/local/cuda/bin ${CMAKE_SOURCE_DIR}/.cache/cuda/root/bin)
  if(NVCC AND (MOETUNE_CUDA STREQUAL "NVCC" OR EXISTS /dev/nvidiactl))
    set(with_cuda ON)
  else()
    set(with_cuda OFF)
  endif()
else()
  set(with_cuda ${MOETUNE_CUDA})
endif()

if(NOT with_cuda)
  return()
endif()

if(NOT CMAKE_CUDA_COMPILER)
  find_program(NVCC nvcc HINTS /usr/local/cuda/bin ${CMAKE_SOURCE_DIR}/.cache/cuda/root/bin
    REQUIRED)
  set(CMAKE_CUDA_COMPILER ${NVCC})
endif()
set(CMAKE_CUDA_ARCHITECTURES OFF) # the flags below say it: 90a and 100a are more than numbers
enable_language(CUDA)
# Its libraries by hand: CMake's own search (3.25) fails on NVIDIA's packages from PyPI.
get_filename_component(cuda_root ${CMAKE_CUDA_COMPILER} REALPATH)
get_filename_component(cuda_root ${cuda_root} DIRECTORY)
set(cuda_lib_dirs ${cuda_root}/../lib64 ${cuda_root}/../lib ${cuda_root}/../targets/x86_64-linux/lib)
find_library(CUBLASLT_LIBRARY cublasLt HINTS ${cuda_lib_dirs} REQUIRED)
find_path(CUDA_INCLUDE_DIR cuda_runtime_api.h HINTS ${cuda_root}/../include
  ${cuda_root}/../targets/x86_64-linux/include REQUIRED)
# CMake takes the toolkit's own directory for one that the loader knows.
get_filename_component(cuda_lib_dir ${CUBLASLT_LIBRARY} DIRECTORY)
list(APPEND CMAKE_BUILD_RPATH ${cuda_lib_dir})
find_library(CUDART_LIBRARY libcudart_static.a HINTS ${cuda_lib_dirs} REQUIRED)

set(cuda_flags -std=c++17 -lineinfo --expt-relaxed-constexpr
  -Xcompiler=-Wall,-Wextra,-Wno-missing-field-initializers
  $<$<BOOL:${MOETUNE_WERROR}>:-Werror=all-warnings>)
set(all_archs "")
foreach(arch ${MOETUNE_CUDA_ARCHS})
  list(APPEND all_archs --generate-code=arch=compute_${arch},code=sm_${arch})
endforeach()
if("80" IN_LIST MOETUNE_CUDA_ARCHS) # chips that came later compile this at start
  list(APPEND all_archs --generate-code=arch=compute_80,code=compute_80)
endif()

function(moetune_cuda_library name)
  cmake_parse_arguments(arg "" "" "SOURCES;ARCHS" ${ARGN})
  add_library(${name} OBJECT ${arg_SOURCES})
  target_compile_options(${name} PRIVATE ${cuda_flags} ${arg_ARCHS})
  target_compile_definitions(${name} PRIVATE _GNU_SOURCE)
  target_include_directories(${name} PRIVATE ${CMAKE_SOURCE_DIR}/src ${CMAKE_SOURCE_DIR}/include)
  target_compile_options(${name} PRIVATE -Xcompiler=-fvisibility=hidden,-fno-gnu-unique)
  set_target_properties(${name} PROPERTIES POSITION_INDEPENDENT_CODE ON)
  target_sources(moetune PRIVATE $<TARGET_OBJECTS:${name}>)
endfunction()

file(GLOB cuda_sources CONFIGURE_DEPENDS src/kernels/cuda/*.cu)
moetune_cuda_library(moetune_cuda SOURCES ${cuda_sources} ARCHS ${all_archs})
if("90a" IN_LIST MOETUNE_CUDA_ARCHS)
  file(GLOB sm90_sources CONFIGURE_DEPENDS src/kernels/cuda/sm90/*.cu)
  moetune_cuda_library(moetune_sm90 SOURCES ${sm90_sources}
    ARCHS --generate-code=arch=compute_90a,code=sm_90a)
else()
  message(FATAL_ERROR "MOETUNE_CUDA_ARCHS must have 90a: src/kernels/cuda/sm90 is part of the backend")
endif()
set_target_properties(moetune PROPERTIES CUDA_ARCHITECTURES OFF)
target_compile_definitions(moetune PRIVATE MOETUNE_WITH_CUDA)
# src/par/nccl*.c, plain C over the run-time. NCCL itself is loaded when it is needed.
target_include_directories(moetune SYSTEM PRIVATE ${CUDA_INCLUDE_DIR})
# And who looks behind their headers, tests/dist and bench/comm.c.
add_library(moetune_nccl INTERFACE)
target_compile_definitions(moetune_nccl INTERFACE MOETUNE_WITH_CUDA)
target_include_directories(moetune_nccl SYSTEM INTERFACE ${CUDA_INCLUDE_DIR})
target_link_libraries(moetune PUBLIC ${CUBLASLT_LIBRARY} ${CUDART_LIBRARY} ${CMAKE_DL_LIBS} rt)

# bench/*.cu: built on request (ninja attention_speed), run by hand on a GPU.
find_library(CUBLAS_LIBRARY cublas HINTS ${cuda_lib_dirs})
file(GLOB cuda_bench_sources CONFIGURE_DEPENDS bench/*.cu)
foreach(source ${cuda_bench_sources})
  get_filename_component(name ${source} NAME_WE)
  add_executable(${name} EXCLUDE_FROM_ALL ${source})
  target_compile_options(${name} PRIVATE ${cuda_flags} ${all_archs})
  target_compile_definitions(${name} PRIVATE _GNU_SOURCE)
  target_include_directories(${name} PRIVATE ${CMAKE_SOURCE_DIR}/src ${CMAKE_SOURCE_DIR}/include
    ${CMAKE_SOURCE_DIR})
  target_link_libraries(${name} PRIVATE moetune)
  set_target_properties(${name} PROPERTIES CUDA_ARCHITECTURES OFF)
endforeach()
# The peers of grouped_gemm: those of which this machine has library or headers.
target_sources(grouped_gemm PRIVATE bench/grouped_gemm/cublas.cu)
if(CUBLAS_LIBRARY)
  target_compile_definitions(grouped_gemm PRIVATE BENCH_WITH_CUBLAS)
  target_link_libraries(grouped_gemm PRIVATE ${CUBLAS_LIBRARY})
endif()
set(MOETUNE_CUTLASS_DIR "" CACHE PATH "CUTLASS's headers for bench/grouped_gemm (bench/get_cutlass.sh)")
if(MOETUNE_CUTLASS_DIR)
  add_library(bench_cutlass OBJECT EXCLUDE_FROM_ALL bench/grouped_gemm/cutlass.cu)
  target_compile_options(bench_cutlass PRIVATE -std=c++17 --expt-relaxed-constexpr
    --generate-code=arch=compute_90a,code=sm_90a)
  target_compile_definitions(bench_cutlass PRIVATE _GNU_SOURCE)
  target_include_directories(bench_cutlass PRIVATE ${CMAKE_SOURCE_DIR}/src
    ${CMAKE_SOURCE_DIR}/include ${CMAKE_SOURCE_DIR})
  target_include_directories(bench_cutlass SYSTEM PRIVATE ${MOETUNE_CUTLASS_DIR}/include
    ${MOETUNE_CUTLASS_DIR}/tools/util/include)
  set_target_properties(bench_cutlass PROPERTIES CUDA_ARCHITECTURES OFF)
  target_sources(grouped_gemm PRIVATE $<TARGET_OBJECTS:bench_cutlass>)
  target_compile_definitions(grouped_gemm PRIVATE BENCH_WITH_CUTLASS)
endif()
