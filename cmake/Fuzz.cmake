# tests/fuzz/fuzz_NAME.c: a libFuzzer program each (clang); tools/fuzz.sh runs them.
if(NOT CMAKE_C_COMPILER_ID MATCHES "Clang")
  message(FATAL_ERROR "MOETUNE_FUZZ needs clang: cmake --preset fuzz")
endif()
target_compile_options(moetune_flags INTERFACE -fsanitize=fuzzer-no-link)
target_link_options(moetune_flags INTERFACE LINKER:--as-needed)
set_target_properties(moetune_cli PROPERTIES EXCLUDE_FROM_ALL TRUE)
file(GLOB fuzz_sources CONFIGURE_DEPENDS tests/fuzz/fuzz_*.c)
foreach(source ${fuzz_sources})
  get_filename_component(name ${source} NAME_WE)
  add_executable(${name} ${source})
  target_link_libraries(${name} PRIVATE moetune)
  target_include_directories(${name} PRIVATE ${CMAKE_SOURCE_DIR}/tests)
  target_compile_options(${name} PRIVATE -Wno-missing-prototypes) # LLVMFuzzerTestOneInput
  target_link_options(${name} PRIVATE -fsanitize=fuzzer)
  # Proof that the note on OpenMP in CMakeLists.txt holds.
  add_custom_command(TARGET ${name} POST_BUILD VERBATIM
    COMMAND sh -c "! readelf -d $<TARGET_FILE:${name}> | grep -E 'NEEDED.*(dnnl|gomp)'")
endforeach()
